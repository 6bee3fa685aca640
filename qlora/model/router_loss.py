"""The load-balancing loss of a mixture's routers, which a config.json can ask for beside the cross-entropy.

For E experts it is E · sum of f_e · P_e over the experts e (Switch Transformer, arXiv:2101.03961, equations 4 to 6).
f_e counts the tokens that the routers of all layers send to expert e, and P_e sums the probabilities that they give it;
both are divided by the tokens times the layers. Padding does not count. transformers computes the same from the logits
of all layers after the pass (`load_balancing_loss_func`); `objective.checks` compares the two.

Here each router adds to both sums as it runs, inside its layer. So no logits are kept until the end of the pass, their
gradient is computed with that of the layer, and a layer that is recomputed computes its part again without adding it.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora.errors import RecipeError
from qlora.model.head import decoder_of

Result = TypeVar("Result")

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""keys of configurations with the weight of the loss: Mixtral and others, JetMoE"""

FUNCTION = "load_balancing_loss_func"
"""name of transformers' function, which the module of each architecture defines"""

PARAMETERS = ("gate_logits", "num_experts", "top_k", "attention_mask")
"""its parameters where it computes the loss above; Doge, whose experts are the product of two routers, has another"""


@dataclass(frozen=True)
class Request:
    """The load-balancing loss that a configuration asks for."""

    key: str
    """key of the coefficient"""
    coefficient: float
    asked: bool
    """True if output_router_logits is true: transformers then adds the loss"""

    @classmethod
    def of(cls, config: Any) -> "Request | None":
        """Return the request of a transformers configuration; None if it has no coefficient, or one of 0."""
        text = config.get_text_config()
        found = [(key, getattr(text, key, None)) for key in COEFFICIENTS]
        found.append(
            (
                "ffn_config.moe_loss_weight",
                getattr(getattr(text, "ffn_config", None), "moe_loss_weight", None),
            )
        )
        key, coefficient = next(((key, value) for key, value in found if value), ("", 0.0))
        return cls(key, float(coefficient), asks(config)) if key else None


def asks(config: Any) -> bool:
    """Return True if a configuration asks for the router's logits, and so for the loss."""
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def is_computed(config: Any) -> bool:
    """Return True if transformers computes the loss for this architecture; also if the architecture is not its own."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return not isinstance(kind, type) or _function(kind) is not None


def is_supported(config: Any) -> bool:
    """Return True if qlora computes it too, as far as the configuration tells."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return not isinstance(kind, type) or _is_known(_function(kind))


def coefficient_of(config: Any, setting: str | float) -> float:
    """Return the coefficient with which a run adds the loss; 0 if it adds none.

    Args:
        config: transformers' configuration of the base.
        setting: `training.router_loss`: auto as the configuration asks, off, or the coefficient.

    Raises:
        RecipeError: the setting is a coefficient, and transformers computes no such loss for the architecture; or the
            loss is another one than qlora computes.
    """
    if setting == "off":
        return 0.0
    if setting == "auto":
        request = Request.of(config)
        coefficient = request.coefficient if request and request.asked and is_computed(config) else 0.0
    else:
        coefficient = float(setting)
        if not is_computed(config):
            raise RecipeError(
                f"training.router_loss: transformers computes no load-balancing loss for {config.model_type}. Leave "
                "this key out"
            )
    if coefficient and not is_supported(config):
        raise _unsupported(config.model_type)
    return coefficient


class RouterLoss:
    """The load-balancing loss of one model, whose routers it watches.

    Args:
        model: a mixture of experts.
        coefficient: weight of the loss beside the cross-entropy.

    Raises:
        RecipeError: qlora does not compute the loss of this architecture.
    """

    def __init__(self, model: Any, coefficient: float) -> None:
        self.coefficient = coefficient
        self.experts, self.chosen = _number(model, "num_experts"), _number(model, "num_experts_per_tok")
        routers = _routers(model)
        if not (_is_known(_function(type(model))) and routers and self.experts and self.chosen):
            raise _unsupported(type(model).__name__)
        for router, index in routers:
            if not any(isinstance(hook, _Hook) for hook in router._forward_hooks.values()):
                router.register_forward_hook(_Hook(index))

    @contextmanager
    def collected(self) -> Iterator["Routed"]:
        """Add up what the routers decide in the forward pass within the context."""
        global _now
        before, _now = _now, Routed(self)
        try:
            yield _now
        finally:
            _now = before


class Routed:
    """Sums over all routers of one forward pass."""

    def __init__(self, settings: RouterLoss, mask: Tensor | None = None) -> None:
        self.settings = settings
        self.mask = mask
        """fp32 [N]: 1 for a token, 0 for padding; None without padding"""
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        """tokens sent to each expert [E], probabilities of each expert [E], and tokens, over the routers so far"""

    def add(self, logits: Tensor) -> None:
        """Add the decisions of one router with these logits [N, E] over the experts."""
        experts, chosen = self.settings.experts, self.settings.chosen
        probabilities = logits.softmax(dim=-1)  # rounded as transformers does, also to 16 bits
        with torch.no_grad():
            ids = probabilities.topk(chosen, dim=-1).indices.flatten()  # [N · chosen]
            each = logits.new_ones(len(logits), dtype=torch.float32) if self.mask is None else self.mask
            assigned = each.new_zeros(experts).scatter_add_(0, ids, each.repeat_interleave(chosen))
        if self.mask is not None:
            probabilities = probabilities * each.to(probabilities.dtype)[:, None]
        new = assigned, probabilities.sum(0, dtype=torch.float32), each.sum()
        old = self._sums
        self._sums = new if old is None else (old[0] + new[0], old[1] + new[1], old[2] + new[2])

    def loss(self) -> Tensor:
        """Return the loss (fp32 scalar), without the coefficient."""
        assert self._sums is not None, "no router has run"
        assigned, probabilities, tokens = self._sums
        return self.settings.experts * (assigned / tokens * (probabilities / tokens)).sum()


_now: Routed | None = None  # not thread-local, because a GPU's backward runs in a separate thread


def add_router_loss(model: Any, setting: str | float) -> None:
    """Let the training of a model add the load-balancing loss as `coefficient_of` says, or not.

    Raises:
        RecipeError: as `coefficient_of` and `RouterLoss`.
    """
    coefficient = coefficient_of(model.config, setting)
    model.router_loss = RouterLoss(model, coefficient) if coefficient else None


def router_loss_of(model: nn.Module) -> RouterLoss | None:
    """Return the load-balancing loss that the training of a model adds, None if it adds none."""
    found = getattr(model, "router_loss", None)
    return found if isinstance(found, RouterLoss) else None


def set_padding(starts: Sequence[int], lengths: Sequence[int], total: int, device: torch.device) -> None:
    """Set which of the `total` tokens of a pass are padding: those outside the rows, given by start and length."""
    if _now is None or sum(lengths) == total:
        return
    mask = torch.zeros(total)
    for start, length in zip(starts, lengths, strict=True):
        mask[start : start + length] = 1
    _now.mask = mask.to(device, non_blocking=True)


def keep_routing(layer: Callable[..., Result]) -> Callable[..., Result]:
    """Wrap `layer` to repeat, in a recompute, what its router's part of the loss computed, without adding it again."""
    if _now is None:
        return layer
    routed, first = _now, True

    def run(*args: Any, **kwargs: Any) -> Result:
        global _now
        nonlocal first
        before = _now
        _now, first = (routed if first else Routed(routed.settings, routed.mask)), False
        try:
            return layer(*args, **kwargs)
        finally:
            _now = before

    return run


@contextmanager
def logits_not_captured(model: Any) -> Iterator[None]:
    """Keep transformers from collecting all layers' logits until the pass ends, as output_router_logits asks.

    They would be as large as all that the routers compute, and nothing reads them.
    """
    config: Any = decoder_of(model).config
    before = getattr(config, "output_router_logits", None)
    if not before:
        yield
        return
    config.output_router_logits = False
    try:
        yield
    finally:
        config.output_router_logits = before


def _function(kind: type) -> Callable[..., Any] | None:
    """Return the function of transformers, or of a model's own code, that computes the loss; None if it has none."""
    return getattr(sys.modules[kind.__module__], FUNCTION, None)


def _is_known(function: Callable[..., Any] | None) -> bool:
    """Return True if a function computes the loss above, as its parameters tell."""
    return function is not None and tuple(inspect.signature(function).parameters) == PARAMETERS


def _unsupported(name: str) -> RecipeError:
    """Return the error for an architecture with another loss."""
    return RecipeError(
        f"training.router_loss: the code of {name} has no load-balancing loss that qlora computes. Set "
        "training.router_loss=off"
    )


def _number(model: Any, name: str) -> int:
    """Return a number of the model or its configuration, as the model's code reads it; 0 if there is none."""
    return int(getattr(model, name, None) or getattr(model.config.get_text_config(), name, None) or 0)


def _routers(model: Any) -> list[tuple[nn.Module, int]]:
    """Return the modules whose outputs transformers collects as router logits, each with the index of the logits."""
    decoder = decoder_of(model)
    specs = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits", [])
    return [
        (module, spec.index)
        for name, module in decoder.named_modules()
        for spec in (specs if isinstance(specs, list) else [specs])
        if isinstance(module, spec.target_class) and (spec.layer_name or "") in name
    ]


@dataclass(frozen=True)
class _Hook:
    """Adds a router's logits to the sums of the pass, if it has any."""

    index: int
    """of the logits among the router's outputs"""

    def __call__(self, router: nn.Module, args: Any, output: Any) -> None:
        if _now is not None:
            logits = output[self.index] if isinstance(output, tuple) else output
            _now.add(logits.flatten(0, -2))
