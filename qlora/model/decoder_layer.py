"""A Llama-like decoder layer, forward and backward with the least kept between them.

Of a layer's forward pass the backward needs: the layer's input, the queries, keys and values that attention
read, attention's output, the stream between the two halves, gate and up. Everything else is rebuilt from these
without a matrix product. transformers' own layer around the same linears keeps nearly twice as much.

A layer can keep less and compute more: without gate and up, half of what it keeps, its MLP computes those two again;
recomputed as a whole it keeps its input alone. Either way the last product of the MLP is left out: its output is the
next layer's input, which nobody needs again. That product is a quarter of the layer.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.methods.lora import LoRALinear
from qlora.model.varlen_attention import asked
from qlora.ops.lora_linear import lora_linears
from qlora.ops.mlp import gated_mlp
from qlora.ops.products import Linear, Update
from qlora.ops.rms_norm import Norm, rms_norm
from qlora.ops.rotary import rotate
from qlora.quantization.nf4 import quant_state

LIKE_LLAMA = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""transformers' layers that compute what is written here"""

COMPUTED_WITH = {
    "attention_mask", "position_embeddings", "position_ids", "document_lengths", "document_ends",
}  # fmt: skip
"""keywords of a layer's call that our passes read"""


class Recompute(Enum):
    """The part of a layer that is computed again in the backward."""

    NOTHING = "nothing"
    MLP = "gate and up of its MLP"
    ALL = "all but its last product"


class LlamaLayer(nn.Module):
    """One of transformers' Llama-like layers with our passes; its modules and their names stay the same.

    original: the layer whose modules are used. It takes the calls that our passes do not know, as with a cache.
    recompute: what is not kept but computed again in the backward.
    checkpoint: calls a function of the layer's input, keeping that alone.
    """

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    original: Callable[..., Tensor]

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for name, module in original.named_children():
            self.add_module(name, module)
        object.__setattr__(self, "original", original)  # its modules are ours: not to be listed twice
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
        if not (self.training and torch.is_grad_enabled()):
            return self._run(hidden_states, **known)
        if self.recompute is not Recompute.ALL:
            return self._run(hidden_states, keep=self.recompute is Recompute.NOTHING, **known)
        passes = iter([True])  # the first is the forward pass, the second a recompute
        return cast(
            Tensor,
            self.checkpoint(
                lambda hidden: self._run(hidden, keep=False, output=next(passes, False), **known),
                hidden_states,
            ),
        )

    def repeated(self, part: Recompute) -> float:
        """The products of weights that a recompute of this part repeats, as a share of a forward pass."""
        attention, mlp = self.self_attn, self.mlp
        others = sum(map(_weights, (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)))
        twice, down = _weights(mlp.gate_proj) + _weights(mlp.up_proj), _weights(mlp.down_proj)
        again = {Recompute.NOTHING: 0, Recompute.MLP: twice, Recompute.ALL: others + twice}[part]
        return again / (others + twice + down)

    def _run(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        keep: bool = True,
        output: bool = True,
        **documents: Any,
    ) -> Tensor:
        """The layer from top to bottom; `keep` and `output` are those of its MLP."""
        attention, mlp = self.self_attn, self.mlp
        norm = _norm(self.input_layernorm)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        heads = (*hidden.shape[:-1], -1, attention.head_dim)
        query, key, value = (y.view(heads) for y in lora_linears(hidden, *_linears(projections), norm))
        if hasattr(attention, "q_norm"):  # Qwen 3
            query, key = rms_norm(query, _norm(attention.q_norm)), rms_norm(key, _norm(attention.k_norm))
        cos, sin = position_embeddings  # [B or 1, T, head_dim]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = self._attend(query, key, value, attention_mask, documents)
        (change,) = lora_linears(attended, *_linears([attention.o_proj]))
        hidden = hidden + change
        norm = _norm(self.post_attention_layernorm)
        linears, updates = _linears([mlp.gate_proj, mlp.up_proj, mlp.down_proj])
        return gated_mlp(hidden, norm, linears, updates, keep=keep, output=output)

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
            sliding_window=_window(attention),
            **documents,
        )
        return attended.flatten(2)


def use_fused_layers(model: nn.Module) -> nn.Module:
    """Put a LlamaLayer in the place of every layer it can stand for, in place; returns the model.

    A layer qualifies by its class, an MLP with SiLU, and norms and linears that are frozen.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _qualifies(child):
                setattr(module, name, LlamaLayer(child))
    return model


def _computes(call: dict[str, Any]) -> bool:
    """Whether our passes compute all that a layer is called for."""
    return {"position_embeddings"} <= asked(call) <= COMPUTED_WITH


def _qualifies(layer: Any) -> bool:
    if type(layer).__name__ not in LIKE_LLAMA:
        return False
    if (
        layer.self_attn.config._attn_implementation not in ALL_ATTENTION_FUNCTIONS
    ):  # "eager" is each model's own
        return False
    if any(type(adapted) is not LoRALinear for adapted in AdaptedLinear.of(layer).values()):
        return False
    trained = {name.rpartition(".")[2] for name, p in layer.named_parameters() if p.requires_grad}
    return isinstance(layer.mlp.act_fn, nn.SiLU | SiLUActivation) and trained <= {"lora_a", "lora_b"}


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


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _window(attention: Any) -> int | None:
    """How many tokens back a token looks, itself counted; None for all."""
    if attention.config.model_type == "mistral":
        return attention.config.sliding_window
    return getattr(attention, "sliding_window", None)
