"""A decoder layer that saves few activations for the backward pass, for each architecture with a spec.

The forward pass saves: the layer's input, the queries, keys and values of attention, attention's output, the residual
stream between attention and MLP, gate and up. The backward pass rebuilds everything else from these without a matrix
product. transformers' own layer around the same linears saves nearly twice as much.

A layer can save less and compute more. Recomputing the MLP saves neither gate nor up, which halves the memory.
Recomputing the whole layer saves only its input. Both skip the last product of the MLP (down_proj), unless a norm
follows it: its output is the next layer's input, and the backward pass does not need it. That product is a quarter of
the layer.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from itertools import chain, repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.methods.lora import LoRALinear
from qlora.errors import listed
from qlora.model.layer_spec import LayerSpec
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

    def repeated(self, part: Recompute) -> float:
        """Return the matrix products that recomputing this part repeats, as a share of a forward pass."""
        attention, mlp = self.self_attn, self.mlp
        others = sum(map(_weights, (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)))
        wide, down = _weights(mlp.gate_proj) + _weights(mlp.up_proj), _weights(mlp.down_proj)
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
        spec, attention, mlp = self.spec, self.self_attn, self.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        query, key, value = lora_linears(hidden, *_linears(projections), self._norm(spec.before_attention))
        if spec.qk_norm:
            query, key = _each(query, spec.norm(attention.q_norm)), _each(key, spec.norm(attention.k_norm))
        query, key, value = (x.unflatten(-1, (-1, attention.head_dim)) for x in (query, key, value))
        cos, sin = position_embeddings  # [B or 1, T, head_dim]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = self._attend(query, key, value, attention_mask, documents)
        (change,) = lora_linears(attended, *_linears([attention.o_proj]))
        if norm := self._norm(spec.after_attention):
            change = rms_norm(change, norm)
        hidden = hidden + change
        linears, updates = _linears([mlp.gate_proj, mlp.up_proj, mlp.down_proj])
        norms = self._norm(spec.before_mlp), self._norm(spec.after_mlp)
        return gated_mlp(hidden, GatedMLP(linears, *norms, spec.activation), updates, mode)

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
            **documents,
        )
        return attended.flatten(2)

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


def why_unfused(model: nn.Module, layer: nn.Module) -> str:
    """Say why `layer`, a decoder layer of `model`, is not a FusedLayer."""
    name = type(model).__name__
    if type(layer).__name__ in LAYER_SPECS:
        if not _has_only_lora(layer):
            return (
                f"adapter.method: only layers with LoRA are fused, and a layer of {name} has other adapters"
            )
        if trained := _trained_itself(layer):
            return f"adapter.train_modules: the layers of {name} are not fused, because {listed(trained)} is trained"
    return f"{name} has no fused layers"


def _computes(call: dict[str, Any]) -> bool:
    """Return True if our passes support every keyword of a layer's call."""
    return {"position_embeddings"} <= nondefault_keywords(call) <= COMPUTED_WITH


def _spec_of(layer: Any) -> LayerSpec | None:
    """Return the spec of a layer that a FusedLayer can replace; None for any other layer."""
    spec = LAYER_SPECS.get(type(layer).__name__)
    if spec is None or not spec.fits(layer):
        return None
    if (
        layer.self_attn.config._attn_implementation not in ALL_ATTENTION_FUNCTIONS
    ):  # each model has its own "eager"
        return None
    return spec if _has_only_lora(layer) and not _trained_itself(layer) else None


def _has_only_lora(layer: nn.Module) -> bool:
    return all(type(adapted) is LoRALinear for adapted in AdaptedLinear.of(layer).values())


def _trained_itself(layer: nn.Module) -> list[str]:
    """Return the names of the trained parameters that are not LoRA's."""
    trained = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    return [name for name in trained if name.rpartition(".")[2] not in ("lora_a", "lora_b")]


def _linears(modules: list[Any]) -> tuple[list[Linear], list[Update]]:
    """Return the arguments of `qlora.ops` for these modules, adapted or not."""
    linears, updates = [], []
    for module in modules:
        if isinstance(module, LoRALinear):
            linear, update = module.product()
        else:
            linear = Linear(module.weight, quant_state(module), module.bias)
            update = Update(None, None)
        linears.append(linear)
        updates.append(update)
    return linears, updates


def _weights(linear: Any) -> int:
    return int(linear.in_features * linear.out_features)


def _each(x: Tensor, norm: Norm) -> Tensor:
    """Normalise each of the n groups of x [..., n * H] separately; H is the width of the norm."""
    return rms_norm(x.unflatten(-1, (-1, len(norm.weight))), norm).flatten(-2)
