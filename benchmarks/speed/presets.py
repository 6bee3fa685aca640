"""Named presets. Each is an architecture, like Llama or a mixture of experts, and the tokens of a step, sized for a
kind of machine.
"""

import dataclasses
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Preset:
    """Architecture and tokens of a step."""

    name: str
    config: dict[str, Any]
    """content of a transformers config.json"""
    sequences: int
    """sequences of a step, all in one micro-batch, with dense tokens"""
    length: int
    """tokens of a sequence; with real data, of the longest document and of a packed row"""
    documents: int = 32
    """documents of a step, with real data"""
    micro_batch: int = 8
    """documents of a padded micro-batch, with real data"""

    def change(self, **changes: Any) -> "Preset":
        """Return a copy with these fields changed; None leaves a field unchanged."""
        return dataclasses.replace(
            self, **{key: value for key, value in changes.items() if value is not None}
        )


class Linear(NamedTuple):
    """A linear layer of a decoder layer, or a projection of all its experts."""

    block: str
    """self_attn, mlp or mlp.experts"""
    projection: str
    """last part of its name"""
    inputs: int
    outputs: int
    experts: int = 1
    active: int = 1
    """experts that a token passes through"""
    frozen: bool = False
    """True for a router, which has no adapter"""

    def rank(self, rank: int) -> int:
        """Return the rank of A and B, or of those of each expert, for an adapter of this rank; 0 without an adapter."""
        return 0 if self.frozen else max(1, rank // self.active)


@dataclass(frozen=True)
class Shape:
    """Dimensions of an architecture that determine its floating point operations."""

    hidden: int
    intermediate: int
    """of the MLP, or of each expert"""
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0
    """experts of a layer; 0 if the layer has an MLP"""
    active: int = 0
    """experts that a token passes through"""

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """Read the dimensions from a config.json."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        experts = config.get("num_experts") or config.get("num_local_experts", 0)
        return cls(
            hidden=hidden,
            intermediate=config.get("moe_intermediate_size") or config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocabulary=config["vocab_size"],
            experts=experts,
            active=config["num_experts_per_tok"] if experts else 0,
        )

    def linears(self) -> list[Linear]:
        """Return the linear layers of a decoder layer: q, k, v, o; then gate, up, down, or a router and its experts."""
        query, key = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        hidden, inner = self.hidden, self.intermediate
        attention = [
            Linear("self_attn", "q_proj", hidden, query),
            Linear("self_attn", "k_proj", hidden, key),
            Linear("self_attn", "v_proj", hidden, key),
            Linear("self_attn", "o_proj", query, hidden),
        ]
        if self.experts:
            counts = self.experts, self.active
            return [
                *attention,
                Linear("mlp", "gate", hidden, self.experts, frozen=True),
                Linear("mlp.experts", "gate_up_proj", hidden, 2 * inner, *counts),
                Linear("mlp.experts", "down_proj", inner, hidden, *counts),
            ]
        wide = [Linear("mlp", name, hidden, inner) for name in ("gate_proj", "up_proj")]
        return [*attention, *wide, Linear("mlp", "down_proj", inner, hidden)]


def llama(
    hidden: int, layers: int, intermediate: int, vocabulary: int, heads: int, **more: Any
) -> dict[str, Any]:
    """Return the config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    } | more


def qwen3_moe(
    hidden: int, layers: int, inner: int, vocabulary: int, heads: int, experts: int, active: int
) -> dict[str, Any]:
    """Return the config.json of a mixture of experts, each with `inner` features between its products."""
    return llama(hidden, layers, 2 * inner, vocabulary, heads) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": hidden // heads,
        "moe_intermediate_size": inner,
        "num_experts": experts,
        "num_experts_per_tok": active,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
    }


def shipped(name: str) -> dict[str, Any]:
    """Return the config.json of an architecture that the package ships."""
    return json.loads((files("qlora") / "bundled" / "configs" / f"{name}.json").read_text())


def preset(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        KeyError: No preset has the name.
    """
    return PRESETS[name]


LLAMA_1B = llama(
    2048,
    16,
    8192,
    128256,
    32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
    rope_theta=500000.0,
)

PRESETS = {
    preset.name: preset
    for preset in (
        # for tests: takes seconds
        Preset("tiny", llama(64, 2, 128, 256, 2), sequences=2, length=32, documents=4, micro_batch=2),
        # for a CPU with few cores
        Preset("cpu", llama(512, 8, 1408, 32000, 8), sequences=4, length=512),
        # mixtures of experts; 128 tokens an expert, as in Qwen3 30B A3B with one row of 2,048 tokens
        Preset("tiny-mixture", qwen3_moe(64, 2, 64, 256, 2, experts=4, active=2), sequences=2, length=32),
        Preset("cpu-mixture", qwen3_moe(512, 4, 512, 4096, 8, experts=32, active=4), sequences=2, length=512),
        # for one GPU
        Preset("llama-3.2-1b", LLAMA_1B, sequences=4, length=2048, documents=128, micro_batch=32),
        *(
            Preset(name, shipped(name), sequences=2, length=2048, documents=128, micro_batch=16)
            for name in ("llama-7b", "llama-3.1-8b", "qwen3-8b", "llama-13b", "llama-33b")
        ),
    )
}
