"""Shapes by name. Each is a Llama-like architecture and a step's tokens, sized for a kind of machine."""

import dataclasses
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Preset:
    """An architecture, and the tokens of a step."""

    name: str
    config: dict[str, Any]
    """a transformers config.json"""
    sequences: int
    """of one step and one micro-batch, with dense tokens"""
    length: int
    """tokens of a sequence; of the longest document and a packed row with real data"""
    documents: int = 32
    """of one step, with real data"""
    micro_batch: int = 8
    """documents of a padded micro-batch, with real data"""

    def change(self, **changes: Any) -> "Preset":
        """The preset with other numbers; None leaves one as it is."""
        return dataclasses.replace(
            self, **{key: value for key, value in changes.items() if value is not None}
        )


@dataclass(frozen=True)
class Shape:
    """The numbers of an architecture that its floating point operations depend on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """From a config.json."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return cls(
            hidden=hidden,
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocabulary=config["vocab_size"],
        )

    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linears of one layer: q, k, v, o, gate, up, down."""
        query, key = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        hidden, intermediate = self.hidden, self.intermediate
        attention = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
        return [*attention, (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]


def llama(
    hidden: int, layers: int, intermediate: int, vocabulary: int, heads: int, **more: Any
) -> dict[str, Any]:
    """A Llama's config.json."""
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


def shipped(name: str) -> dict[str, Any]:
    """The config.json of an architecture that the package ships."""
    return json.loads((files("qlora") / "bundled" / "configs" / f"{name}.json").read_text())


def preset(name: str) -> Preset:
    """The preset called `name`. Raises KeyError."""
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
        # for tests: seconds
        Preset("tiny", llama(64, 2, 128, 256, 2), sequences=2, length=32, documents=4, micro_batch=2),
        # for a CPU with few cores
        Preset("cpu", llama(512, 8, 1408, 32000, 8), sequences=4, length=512),
        # for one GPU
        Preset("llama-3.2-1b", LLAMA_1B, sequences=4, length=2048, documents=128, micro_batch=32),
        *(
            Preset(name, shipped(name), sequences=2, length=2048, documents=128, micro_batch=16)
            for name in ("llama-7b", "llama-3.1-8b", "qwen3-8b", "llama-13b", "llama-33b")
        ),
    )
}
