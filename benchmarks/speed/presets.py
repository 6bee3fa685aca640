"""Named presets. Each is a Llama-like architecture and the tokens of a step, sized for a kind of machine."""

import dataclasses
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


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


@dataclass(frozen=True)
class Shape:
    """Dimensions of an architecture that determine its floating point operations."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """Read the dimensions from a config.json."""
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
        """Return (in, out) of the linear layers of one decoder layer: q, k, v, o, gate, up, down."""
        query, key = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        hidden, intermediate = self.hidden, self.intermediate
        attention = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
        return [*attention, (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]


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
        # for one GPU
        Preset("llama-3.2-1b", LLAMA_1B, sequences=4, length=2048, documents=128, micro_batch=32),
        *(
            Preset(name, shipped(name), sequences=2, length=2048, documents=128, micro_batch=16)
            for name in ("llama-7b", "llama-3.1-8b", "qwen3-8b", "llama-13b", "llama-33b")
        ),
    )
}
