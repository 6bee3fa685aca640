"""The experts of a mixture with our forward and backward pass, in place of transformers' modules.

transformers keeps the experts of a layer in a module with two parameters of three dimensions. `use_expert_stacks`
replaces each such module; its projections become modules under the same names, which can be in NF4 and have an adapter.
A module without the interface that `is_experts` knows keeps transformers' own code.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.lora_experts import LoRAExperts, projection_of
from qlora.adapter.weighted_inputs import give_all_tokens, give_choices
from qlora.kernels import GELU_TANH, SILU, Activation
from qlora.ops.expert_product import Projection
from qlora.ops.experts import Experts, mixture
from qlora.ops.mlp import Forward
from qlora.ops.products import Update
from qlora.quantization.expert_stack import ExpertStack, expert_stacks, is_experts
from qlora.recipe.sizes import parameters_text
from qlora.runtime.device import on_cuda

ACTIVATIONS: dict[str, Activation] = {"SiLU": SILU, "SiLUActivation": SILU, "GELUTanh": GELU_TANH}
"""our activations by the name of torch's or transformers' class"""

OWN_ROWS, OWN_ROWS_CUDA = 64, 1024
"""rows for which a model's own function between the products is called at once"""

GROUP_BYTES = 2**26
"""largest size of the dequantized W_wide of the experts that a GPU processes at once"""

ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "top_k")
"""names in a config of the number of experts that a token passes through"""


class ExpertsModule(nn.Module):
    """The experts of a layer; its projections have the names of transformers' parameters.

    Args:
        original: transformers' module; its activation stays in use.
        active: number of experts that a token passes through.
    """

    original: Any
    down_proj: ExpertStack | LoRAExperts

    def __init__(self, original: nn.Module, active: int) -> None:
        super().__init__()
        # not a submodule: its parameters would be listed twice
        object.__setattr__(self, "original", original)
        self.gate = gate_of(original)
        self._mode = Forward.SAVE
        self.wide_name = "gate_up_proj" if original.has_gate else "up_proj"
        for name in (self.wide_name, "down_proj"):
            bias = getattr(original, f"{name}_bias") if original.has_bias else None
            weight = getattr(original, name)
            weight = getattr(weight, "packed", weight)
            stack = ExpertStack(weight, bias, transposed=bool(original.is_transposed), active=active)
            self.add_module(name, stack)
        self.train(original.training)

    @property
    def wide(self) -> Any:
        """The projection of the input: gate and up in one, or up alone."""
        return getattr(self, self.wide_name)

    @property
    def weights_of_a_token(self) -> tuple[int, int]:
        """Number of weights that a token is multiplied with, of the projection of the input and of down_proj."""
        stacks = _stack(self.wide), _stack(self.down_proj)
        wide, down = (stack.active * stack.out_features * stack.in_features for stack in stacks)
        return wide, down

    @contextmanager
    def in_mode(self, mode: Forward) -> Iterator[None]:
        """Let the passes within the context keep what `mode` says; other passes save all that the backward reads."""
        self._mode = mode
        try:
            yield
        finally:
            self._mode = Forward.SAVE

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map tokens [N, H] to [N, H] through the experts `top_k_index` [N, K], weighted by `top_k_weights` [N, K]."""
        (wide, wide_update), (down, down_update) = product(self.wide), product(self.down_proj)
        number = _stack(self.down_proj).experts
        group = min(number, _group(_stack(self.wide), hidden_states))
        experts = Experts(number, wide, down, self.gate, group)
        updates = wide_update, down_update
        return mixture(hidden_states, top_k_index, top_k_weights, experts, updates, self._mode)


class ExpertsOrIdentity(ExpertsModule):
    """Experts of which those with the highest numbers have no matrices and return their input, as LongCat's."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map tokens as an `ExpertsModule` does; choices above the last expert of `down_proj` are identities."""
        chosen = top_k_index < _stack(self.down_proj).experts
        same = top_k_weights.masked_fill(chosen, 0).sum(-1, keepdim=True)
        result = super().forward(hidden_states, top_k_index, top_k_weights)
        return result + hidden_states * same.to(hidden_states.dtype)


def product(projection: Any) -> tuple[Projection, Update]:
    """Return the arguments of `qlora.ops.experts` for a projection, adapted or not."""
    if isinstance(projection, LoRAExperts):
        return projection.product()
    return projection_of(projection), Update(None, None)


def _stack(projection: Any) -> ExpertStack:
    return projection.base if isinstance(projection, LoRAExperts) else projection


def _group(stack: ExpertStack, hidden: Tensor) -> int:
    """Return how many experts are processed at once: on a GPU as many as GROUP_BYTES allow, elsewhere one."""
    matrix = stack.out_features * stack.in_features * hidden.dtype.itemsize
    return min(stack.experts, max(1, GROUP_BYTES // matrix)) if on_cuda(hidden) else 1


class ConcatenatedGate:
    """act(gate) * up of W_wide's output [gate, up], with our kernels."""

    def __init__(self, act_fn: nn.Module) -> None:
        self._activation = ACTIVATIONS[type(act_fn).__name__]

    def product(self, wide: Tensor, out: Tensor) -> None:
        """Map [S, 2 I] to `out` [S, I]."""
        gate, up = _halves(wide)
        self._activation.product(gate, up, out)

    def gradient(self, wide: Tensor, d_product: Tensor, out: Tensor) -> None:
        """Write the gradient of `wide` to `out` [S, 2 I]; overwrites `d_product` [S, I]."""
        gate, up = _halves(wide)
        d_gate, d_up = out.chunk(2, dim=-1)
        own = torch.empty_like(up) if on_cuda(wide) else d_up
        self._activation.gradients(gate, up, d_product, own)
        d_gate.copy_(d_product)
        if own is not d_up:
            d_up.copy_(own)


def _halves(wide: Tensor) -> list[Tensor]:
    """Return gate and up [S, I] of [S, 2 I]; copies on CUDA, whose kernels take no views."""
    halves = wide.chunk(2, dim=-1)
    return [half.contiguous() for half in halves] if on_cuda(wide) else list(halves)


class OwnGate:
    """The model's own function of W_wide's output; torch differentiates it.

    It is called with the same number of rows each time, so that its memory does not depend on the routing.
    """

    def __init__(self, original: Any) -> None:
        self._apply = original._apply_gate if original.has_gate else original.act_fn

    def product(self, wide: Tensor, out: Tensor) -> None:
        """Map [S, wide] to `out` [S, I]."""
        for rows, to in _blocks(wide, out):
            to.copy_(self._apply(rows)[: len(to)])

    def gradient(self, wide: Tensor, d_product: Tensor, out: Tensor) -> None:
        """Write the gradient of `wide` to `out` [S, wide]."""
        for rows, d_rows, to in _blocks(wide, d_product, out):
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                to.copy_(torch.autograd.grad(self._apply(rows), rows, d_rows)[0][: len(to)])


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of rows of all tensors, of equal size but for the last tensor, which has no padding."""
    size = OWN_ROWS_CUDA if on_cuda(tensors[0]) else OWN_ROWS
    *inputs, out = (tensor.split(size) for tensor in tensors)
    for number, to in enumerate(out):
        yield *(pad(parts[number], (0, 0, 0, size - len(to))) for parts in inputs), to


def gate_of(original: Any) -> ConcatenatedGate | OwnGate:
    """Return the function between the two products of transformers' experts."""
    own = getattr(type(original), "_apply_gate", None)
    default = original.has_gate and (own is None or own.__module__ == "transformers.integrations.moe")
    if default and original.is_concatenated and type(original.act_fn).__name__ in ACTIVATIONS:
        return ConcatenatedGate(original.act_fn)
    return OwnGate(original)


def use_expert_stacks(model: nn.Module) -> nn.Module:
    """Replace transformers' expert modules of `model` by an ExpertsModule each, in place, and return the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_experts(child):
                active = active_of(getattr(child, "config", parent))
                kind = ExpertsOrIdentity if hasattr(child, "identity_expert") else ExpertsModule
                setattr(parent, name, kind(child, active))
                give_choices(parent)
    return model


def restore_experts(model: nn.Module, kept: Collection[str]) -> None:
    """Put transformers' modules back in place of those that are dense and have none of the projections `kept`."""
    own = {name: module for name, module in model.named_modules() if isinstance(module, ExpertsModule)}
    for name, module in own.items():
        if not module.wide.packed and not any(layer.startswith(f"{name}.") for layer in kept):
            model.set_submodule(name, module.original)
            give_all_tokens(model.get_submodule(name.rpartition(".")[0]))


def expert_notes(model: nn.Module) -> list[str]:
    """Return a remark on the adapter of the experts, or on its absence; none for a model without such experts."""
    layers, stacks = AdaptedLayer.of(model), expert_stacks(model)
    adapted = LoRAExperts.of(model)
    if not layers or not stacks:
        return []
    if not adapted:
        weights = sum(stack.numel() for stack in stacks.values())
        return [
            f"the adapter leaves out the experts, which have {parameters_text(weights)} weights; LoRA on targets "
            "all-linear or experts reaches them"
        ]
    ranks = sorted({layer.rank for layer in adapted.values()})
    own = sum(_trained(layer) for layer in adapted.values())
    share = own / sum(_trained(layer) for layer in layers.values())
    return [
        f"LoRA on the experts: {len(adapted)} projections of {_counts(adapted)} experts, rank "
        f"{' and '.join(map(str, ranks))} each; {share:.0%} of the adapter's {parameters_text(round(own / share))} "
        "parameters"
    ]


def _counts(layers: Mapping[str, LoRAExperts]) -> str:
    counts = sorted({layer.base.experts for layer in layers.values()})
    return " or ".join(f"{count:,}" for count in counts)


def _trained(layer: AdaptedLayer) -> int:
    return sum(parameter.numel() for parameter in layer.saved().values())


def active_of(config: Any) -> int:
    """Return the number of experts that a token passes through; 0 if the config does not say it."""
    numbers = (getattr(config, name, None) for name in ACTIVE)
    for number in numbers:
        if isinstance(number, list | tuple) and number:
            number = number[0]
        if isinstance(number, int) and not isinstance(number, bool) and number > 0:
            return number
    return 0
