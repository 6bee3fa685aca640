"""A decoder layer that saves few activations for the backward pass, for each architecture with a spec.

The forward pass saves: the layer's input, the queries, keys and values of attention, attention's output, the residual
stream between attention and MLP, gate and up. The backward pass rebuilds everything else from these without a matrix
product. transformers' own layer around the same linears saves nearly twice as much.

A layer can save less and compute more. Recomputing the MLP saves neither gate nor up, which halves the memory.
Recomputing the whole layer saves only its input. Both skip the last product of the MLP (down_proj), unless a norm
follows it: its output is the next layer's input, and the backward pass does not need it. That product is a quarter of
the layer.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from enum import Enum
from functools import partial
from itertools import chain, repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.experts import ExpertsModule
from qlora.adapter.methods.lora import LoRALinear
from qlora.errors import listed
from qlora.model.layer_spec import LayerSpec, Rotary
from qlora.model.layer_specs import LAYER_SPECS
from qlora.model.varlen_attention import nondefault_keywords
from qlora.ops.lora_linear import lora_linears
from qlora.ops.mlp import Forward, GatedMLP, gated_mlp
from qlora.ops.products import Linear, Update
from qlora.ops.rms_norm import Norm, rms_norm
from qlora.ops.rotary import rotate
from qlora.quantization.nf4 import quant_state

COMPUTED_WITH = {
    "attention_mask", "position_embeddings", "position_ids", "document_lengths", "document_ends",
}  # fmt: skip
"""keywords of a layer's call that our forward pass supports"""


class Recompute(Enum):
    """Part of a layer that is recomputed in the backward pass."""

    NOTHING = "nothing"
    MLP = "gate and up of its MLP"
    ALL = "all but its last product"


class FusedLayer(nn.Module):
    """A decoder layer of transformers with our forward and backward pass; its modules and their names stay the same.

    Args:
        original: the layer of transformers. It still handles calls that our passes do not support, such as with a
            cache.
        spec: description of what the layer computes.

    Attributes:
        recompute: part of the layer that is recomputed in the backward pass.
        checkpoint: like torch.utils.checkpoint; saves only the layer's input.
    """

    self_attn: Any
    mlp: Any
    original: Callable[..., Tensor]

    def __init__(self, original: nn.Module, spec: LayerSpec) -> None:
        super().__init__()
        for name, module in original.named_children():
            self.add_module(name, module)
        object.__setattr__(self, "original", original)  # not a submodule: its modules would be listed twice
        self.spec = spec
        self.recompute = Recompute.NOTHING
        self.checkpoint: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        self.train(original.training)

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        """Map hidden_states [B, T, H] to [B, T, H].

        Args:
            hidden_states: the layer's input.
            call: keywords that transformers passes to its layers. If our passes do not support one of them, such as a
                cache, transformers' own layer handles the whole call.
        """
        if not _computes(call):
            return self.original(hidden_states, **call)
        known: dict[str, Any] = {name: call.get(name) for name in COMPUTED_WITH}
        if not (self.training and torch.is_grad_enabled()) or self.recompute is Recompute.NOTHING:
            return self._run(hidden_states, Forward.SAVE, **known)
        if self.recompute is Recompute.MLP:
            return self._run(hidden_states, Forward.RECOMPUTE_WIDE, **known)
        # The first call is the forward pass; each later call is a recomputation
        modes = chain([Forward.RECOMPUTE_WIDE], repeat(Forward.RECOMPUTE))
        return cast(
            Tensor, self.checkpoint(lambda hidden: self._run(hidden, next(modes), **known), hidden_states)
        )

    @property
    def mlp_alone(self) -> bool:
        """True if the MLP can be recomputed alone, which transformers' own experts cannot."""
        return self.spec.is_gated(self.mlp) or self._experts is not None

    @property
    def _experts(self) -> ExpertsModule | None:
        """The experts in place of the MLP, if our pass computes them."""
        found = [module for module in self.mlp.modules() if isinstance(module, ExpertsModule)]
        return found[0] if len(found) == 1 else None

    def repeated(self, part: Recompute) -> float:
        """Return the matrix products that recomputing this part repeats, as a share of a forward pass."""
        attention, mlp = self.self_attn, self.mlp
        if not self.mlp_alone:
            return 1.0
        others = sum(map(_weights, (*_named(attention, self.spec.qkv), attention.o_proj)))
        if (experts := self._experts) is not None:
            wide, down = experts.weights_of_a_token
        else:
            wide, down = sum(map(_weights, _named(mlp, self.spec.gate_up))), _weights(mlp.down_proj)
        of_mlp = wide if self.spec.after_mlp is None else wide + down
        again = {Recompute.NOTHING: 0, Recompute.MLP: of_mlp, Recompute.ALL: others + of_mlp}[part]
        return again / (others + wide + down)

    def _run(
        self,
        hidden: Tensor,
        mode: Forward,
        *,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        **documents: Any,
    ) -> Tensor:
        """Compute the layer; `mode` is the mode of its MLP."""
        spec, attention = self.spec, self.self_attn
        query, key, value = self._project(hidden)
        if spec.qk_norm:
            query, key = _each(query, spec.norm(attention.q_norm)), _each(key, spec.norm(attention.k_norm))
        query, key, value = (x.unflatten(-1, (-1, attention.head_dim)) for x in (query, key, value))
        if spec.rotates(attention):
            cos, sin = map(spec.angles, position_embeddings)  # [B or 1, T, rotated features]
            in_pairs = spec.rotary is not Rotary.HALVES
            query, key = (rotate(x, cos, sin, in_pairs=in_pairs) for x in (query, key))
        attended = self._attend(query, key, value, attention_mask, documents)
        (change,) = lora_linears(attended, *_linears([attention.o_proj]))
        if norm := self._norm(spec.after_attention):
            change = rms_norm(change, norm)
        if spec.parallel:
            return self._after_mlp(hidden, mode) + change
        hidden = torch.add(hidden, change, alpha=spec.scale_of(self.original))
        return self._after_mlp(hidden, mode)

    def _project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values [B, T, features] of the layer's input."""
        spec, attention = self.spec, self.self_attn
        projections = _named(attention, spec.qkv)
        queries = attention.o_proj.in_features
        keys = (projections[0].out_features - queries) // 2
        linears, updates = _linears(projections, (queries, keys, keys))
        return lora_linears(hidden, linears, updates, self._norm(spec.before_attention))

    def _after_mlp(self, hidden: Tensor, mode: Forward) -> Tensor:
        """Apply the MLP to the residual stream [B, T, H]; return the residual stream after it."""
        spec, mlp = self.spec, self.mlp
        norm, post_norm = self._norm(spec.before_mlp), self._norm(spec.after_mlp)
        if not spec.is_gated(mlp):
            if mode is Forward.RECOMPUTE and post_norm is not None:  # which reads the output of the experts
                mode = Forward.RECOMPUTE_WIDE
            with nullcontext() if self._experts is None else self._experts.in_mode(mode):
                change = mlp(hidden if norm is None else rms_norm(hidden, norm))
            change = change[0] if isinstance(change, tuple) else change  # some add the router's logits
            change = change if post_norm is None else rms_norm(change, post_norm)
            return torch.add(hidden, change, alpha=spec.scale_of(self.original))
        half = mlp.down_proj.in_features
        wide, wide_updates = _linears(_named(mlp, spec.gate_up), (half, half))
        down, down_update = _linears([mlp.down_proj])
        block = GatedMLP([*wide, *down], norm, post_norm, spec.activation, spec.scale_of(self.original))
        return gated_mlp(hidden, block, [*wide_updates, *down_update], mode)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, documents: dict[str, Any]
    ) -> Tensor:
        """Attend with the model's implementation: three [B, T, heads, head_dim] -> [B, T, heads * head_dim]."""
        attention = self.self_attn
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        attended, _ = attend(
            attention,
            *(x.transpose(1, 2) for x in (query, key, value)),
            mask,
            dropout=attention.attention_dropout if self.training else 0.0,
            scaling=attention.scaling,
            sliding_window=self.spec.window_of(attention),
            **self._cap(),
            **documents,
        )
        return attended.flatten(2)

    def _cap(self) -> dict[str, float]:
        """Return the keyword for the bound of the attention scores, if there is one."""
        softcap = self.spec.softcap_of(self.self_attn)
        return {} if softcap is None else {"softcap": softcap}

    def _norm(self, name: str | None) -> Norm | None:
        return None if name is None else self.spec.norm(self.get_submodule(name))


def use_fused_layers(model: nn.Module) -> nn.Module:
    """Replace every supported decoder layer by a FusedLayer, in place, and return the model.

    A layer is supported if a spec fits it and its norms and linears are frozen, apart from LoRA.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if spec := _spec_of(child):
                setattr(module, name, FusedLayer(child, spec))
    return model


def unfused_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers that a spec describes, but that could not be replaced."""
    fused = {id(m.original) for m in model.modules() if isinstance(m, FusedLayer)}
    return [
        module
        for module in model.modules()
        if type(module).__name__ in LAYER_SPECS and id(module) not in fused
    ]


def why_mlp_not_alone(model: nn.Module, layer: nn.Module) -> str:
    """Say why the MLP of `layer`, a decoder layer of `model`, cannot be recomputed alone."""
    name = type(model).__name__
    if isinstance(layer, FusedLayer):
        return f"the experts of {name} have no pass of ours"
    if type(layer).__name__ in LAYER_SPECS:
        if not _has_only_lora(layer):
            return (
                f"adapter.method: only layers with LoRA are fused, and a layer of {name} has other adapters"
            )
        if trained := _trained_itself(layer):
            return f"adapter.train_modules: the layers of {name} are not fused, because {listed(trained)} is trained"
    return why_undescribed(model, layer) or f"{name} has no fused layers"


def why_undescribed(model: nn.Module, layer: nn.Module) -> str | None:
    """Say why no spec describes `layer`, a decoder layer of `model`; None if one does."""
    spec = LAYER_SPECS.get(type(layer).__name__)
    if spec is None:
        return f"{type(model).__name__} has no fused layers"
    obstacle = spec.obstacle(layer)
    return None if obstacle is None else f"the layers of {type(model).__name__} are not fused: {obstacle}"


def _computes(call: dict[str, Any]) -> bool:
    """Return True if our passes support every keyword of a layer's call."""
    return {"position_embeddings"} <= nondefault_keywords(call) <= COMPUTED_WITH


def _spec_of(layer: Any) -> LayerSpec | None:
    """Return the spec of a layer that a FusedLayer can replace; None for any other layer."""
    spec = LAYER_SPECS.get(type(layer).__name__)
    if spec is None or spec.obstacle(layer) is not None:
        return None
    if (
        layer.self_attn.config._attn_implementation not in ALL_ATTENTION_FUNCTIONS
    ):  # each model has its own "eager"
        return None
    return spec if _has_only_lora(layer) and not _trained_itself(layer) else None


def _has_only_lora(layer: nn.Module) -> bool:
    adapted = {name: module for name, module in AdaptedLinear.of(layer).items() if _is_ours(layer, name)}
    return all(type(module) is LoRALinear for module in adapted.values())


def _trained_itself(layer: nn.Module) -> list[str]:
    """Return the names of the trained parameters that are not LoRA's; experts can be trained in any way."""
    trained = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    ours = [name for name in trained if _is_ours(layer, name)]
    return [name for name in ours if name.rpartition(".")[2] not in ("lora_a", "lora_b")]


def _is_ours(layer: Any, name: str) -> bool:
    """Return True if our passes compute with the module or parameter `name` of a layer, not the code of experts."""
    return LAYER_SPECS[type(layer).__name__].is_gated(layer.mlp) or not name.startswith("mlp.")


def _named(parent: Any, names: Sequence[str]) -> list[Any]:
    return [getattr(parent, name) for name in names]


def _linears(modules: list[Any], sizes: tuple[int, ...] = ()) -> tuple[list[Linear], list[Update]]:
    """Return the arguments of `qlora.ops` for these modules, adapted or not.

    sizes: the widths of the outputs; a single module is a linear with all of them.
    """
    linears, updates = [], []
    for module in modules:
        if isinstance(module, LoRALinear):
            linear, update = module.product()
        else:
            linear = Linear(module.weight, quant_state(module), module.bias)
            update = Update(None, None)
        linears.append(linear._replace(sizes=sizes) if len(modules) == 1 else linear)
        updates.append(update)
    return linears, updates


def _weights(linear: Any) -> int:
    return int(linear.in_features * linear.out_features)


def _each(x: Tensor, norm: Norm) -> Tensor:
    """Normalise each of the n groups of x [..., n * H] separately; H is the width of the norm."""
    return rms_norm(x.unflatten(-1, (-1, len(norm.weight))), norm).flatten(-2)
