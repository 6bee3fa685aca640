"""A decoder layer, forward and backward with the least kept between them, for each architecture that has a spec.

Of a layer's forward pass the backward needs: the layer's input, the queries, keys and values that attention
read, attention's output, the stream between the two halves, gate and up. Everything else is rebuilt from these
without a matrix product. transformers' own layer around the same linears keeps nearly twice as much.

A layer can keep less and compute more: without gate and up, half of what it keeps, its MLP computes those two again;
recomputed as a whole it keeps its input alone. Either way the last product of the MLP is left out, unless a norm
follows it: its output is the next layer's input, which nobody needs again. That product is a quarter of the layer.
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
from qlora.model.layer_spec import LayerSpec
from qlora.model.layer_specs import LAYER_SPECS
from qlora.model.varlen_attention import asked
from qlora.ops.lora_linear import lora_linears
from qlora.ops.mlp import Forward, GatedMLP, gated_mlp
from qlora.ops.products import Linear, Update
from qlora.ops.rms_norm import Norm, rms_norm
from qlora.ops.rotary import rotate
from qlora.quantization.nf4 import quant_state

COMPUTED_WITH = {
    "attention_mask", "position_embeddings", "position_ids", "document_lengths", "document_ends",
}  # fmt: skip
"""keywords of a layer's call that our passes read"""


class Recompute(Enum):
    """The part of a layer that is computed again in the backward."""

    NOTHING = "nothing"
    MLP = "gate and up of its MLP"
    ALL = "all but its last product"


class FusedLayer(nn.Module):
    """One of transformers' decoder layers with our passes; its modules and their names stay the same.

    original: the layer whose modules are used. It takes the calls that our passes do not know, as with a cache.
    spec: what the layer computes.
    recompute: what is not kept but computed again in the backward.
    checkpoint: calls a function of the layer's input, keeping that alone.
    """

    self_attn: Any
    mlp: Any
    original: Callable[..., Tensor]

    def __init__(self, original: nn.Module, spec: LayerSpec) -> None:
        super().__init__()
        for name, module in original.named_children():
            self.add_module(name, module)
        object.__setattr__(self, "original", original)  # its modules are ours: not to be listed twice
        self.spec = spec
        self.recompute = Recompute.NOTHING
        self.checkpoint: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        self.train(original.training)

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        """hidden_states [B, T, H] -> [B, T, H].

        `call`: the keywords that a model of transformers passes to its layers. If our passes do not know one of them,
        such as a cache, transformers' own layer takes the whole call.
        """
        if not _computes(call):
            return self.original(hidden_states, **call)
        known: dict[str, Any] = {name: call.get(name) for name in COMPUTED_WITH}
        if not (self.training and torch.is_grad_enabled()) or self.recompute is Recompute.NOTHING:
            return self._run(hidden_states, Forward.KEEPING, **known)
        if self.recompute is Recompute.MLP:
            return self._run(hidden_states, Forward.SPARING, **known)
        # The first call is the forward pass, each later one a recompute
        modes = chain([Forward.SPARING], repeat(Forward.RECOMPUTE))
        return cast(
            Tensor, self.checkpoint(lambda hidden: self._run(hidden, next(modes), **known), hidden_states)
        )

    def repeated(self, part: Recompute) -> float:
        """The products of weights that a recompute of this part repeats, as a share of a forward pass."""
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
        """The layer from top to bottom; `mode` is that of its MLP."""
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
        """[B, T, heads, head_dim] each -> [B, T, heads * head_dim], by the model's attention implementation."""
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
    """Put a FusedLayer in the place of every layer it can stand for, in place; returns the model.

    A layer qualifies by a spec that fits it, and norms and linears that are frozen.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if spec := _spec_of(child):
                setattr(module, name, FusedLayer(child, spec))
    return model


def _computes(call: dict[str, Any]) -> bool:
    """Whether our passes compute all that a layer is called for."""
    return {"position_embeddings"} <= asked(call) <= COMPUTED_WITH


def _spec_of(layer: Any) -> LayerSpec | None:
    """What the layer computes; None where it keeps its own passes."""
    spec = LAYER_SPECS.get(type(layer).__name__)
    if spec is None or not spec.fits(layer):
        return None
    if (
        layer.self_attn.config._attn_implementation not in ALL_ATTENTION_FUNCTIONS
    ):  # "eager" is each model's own
        return None
    if any(type(adapted) is not LoRALinear for adapted in AdaptedLinear.of(layer).values()):
        return None
    trained = {name.rpartition(".")[2] for name, p in layer.named_parameters() if p.requires_grad}
    return spec if trained <= {"lora_a", "lora_b"} else None


def _linears(modules: list[Any]) -> tuple[list[Linear], list[Update]]:
    """The modules, adapted or not, as the products take them."""
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
    """x [..., n * H], of which each n is normalised on its own; H is as wide as the norm."""
    return rms_norm(x.unflatten(-1, (-1, len(norm.weight))), norm).flatten(-2)
