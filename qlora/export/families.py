"""Model families that llama.cpp runs and qlora writes as GGUF, and their settings in a GGUF file.

llama.cpp fixes much of an architecture in its code: the activation, the layers with a sliding window, the scale of the
scores. A setting that it would ignore is refused here, because the file would load and compute something else.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`, as llama.cpp knows them."""

    name: str
    """name for the user"""
    arch: str
    """llama.cpp's name of the architecture"""
    activation: str = "silu"
    """the only activation of the feed-forward layers that llama.cpp computes for it"""
    interleaved: bool = False
    """True if llama.cpp rotates neighbouring pairs of a head's values, where transformers rotates its two halves"""
    norm_offset: float = 0.0
    """added to a norm's stored weight: llama.cpp multiplies by the sum"""
    window_every: int | None = None
    """each such layer attends to all tokens, the others to a window; None: llama.cpp knows no window here"""
    fixed_scale: int | None = None
    """number of layers of the one size whose scores are scaled by its width per head instead of its head size"""
    biases: bool = True
    """False if llama.cpp reads no bias of the attention's layers"""


_GELU = "gelu_pytorch_tanh"
_GEMMA_3 = Family("Gemma 3", "gemma3", _GELU, norm_offset=1.0, window_every=6, fixed_scale=62, biases=False)

FAMILIES = {
    "llama": Family("Llama", "llama", interleaved=True),
    "mistral": Family("Mistral", "llama", interleaved=True),
    "qwen2": Family("Qwen 2 and 2.5", "qwen2"),
    "qwen3": Family("Qwen 3", "qwen3", biases=False),
    "gemma": Family("Gemma", "gemma", _GELU, norm_offset=1.0, biases=False),
    "gemma2": Family(
        "Gemma 2", "gemma2", _GELU, norm_offset=1.0, window_every=2, fixed_scale=46, biases=False
    ),
    "gemma3_text": _GEMMA_3,
    "gemma3": _GEMMA_3,
}
"""by transformers' `model_type`"""


def family_of(config: Any) -> Family:
    """Return the family of a model's configuration.

    Raises:
        ModelError: the architecture is none of `FAMILIES`.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(dict.fromkeys(one.name for one in FAMILIES.values()))
        raise ModelError(
            f"GGUF is written for {known}, and this model is {config.model_type}. Write a merged model with "
            "`qlora merge`, and convert it with llama.cpp's own convert_hf_to_gguf.py"
        )
    return family


@dataclass(frozen=True)
class Settings:
    """Settings of a model in a GGUF file: sizes, heads, rotation, windows."""

    family: Family
    config: Any
    """transformers' configuration of the text model"""
    context: int
    """tokens"""
    notes: tuple[str, ...] = ()
    """what the user should know about the difference from transformers"""

    @classmethod
    def of(cls, whole: Any) -> "Settings":
        """Check a model's configuration.

        Raises:
            ModelError: llama.cpp would ignore one of the settings, or the family is unknown.
        """
        family, config = family_of(whole), whole.get_text_config()
        _check(family, config)
        context = config.max_position_embeddings
        notes = []
        if whole is not config:
            notes.append(f"{family.name}: only the text model is written, without the part that reads images")
        window = _window(config)
        if family.window_every is None and window is not None and window < context:
            context = window
            notes.append(
                f"llama.cpp has no sliding window for {family.name}: the context ends at {window} tokens, up to which "
                "the window changes nothing"
            )
        return cls(family, config, context, tuple(notes))

    @property
    def heads(self) -> tuple[int, int]:
        """Number of heads of the queries, and of keys and values."""
        return self.config.num_attention_heads, self.config.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Values of one head."""
        return _head_size(self.config)

    @property
    def rope(self) -> dict[str, Any]:
        """Rotation of the layers that attend to all tokens."""
        return _rope(self.config)

    def write(self, writer: "GGUFWriter") -> None:
        """Add the settings to a GGUF file."""
        config, window = self.config, _window(self.config)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.heads[0])
        writer.add_head_count_kv(self.heads[1])
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_rope_freq_base(self.rope["rope_theta"])
        if self.family.window_every is not None and window is not None:
            writer.add_sliding_window(window)
        if "sliding_attention" in config.rope_parameters:
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        for name, add in (
            ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
            ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ):
            if getattr(config, name, None):
                add(getattr(config, name))
        self._write_scaling(writer)

    def _write_scaling(self, writer: "GGUFWriter") -> None:
        from gguf import RopeScalingType

        rope = self.rope
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        elif rope["rope_type"] == "yarn":
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _rope(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return dict(rope.get("full_attention", rope))


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _window(config: Any) -> int | None:
    """Return the size of the sliding window; None if no layer has one."""
    return config.sliding_window if getattr(config, "use_sliding_window", True) and _windows(config) else None


def _windows(config: Any) -> list[bool] | None:
    """Return for each layer whether it has a sliding window; None if no layer has one."""
    if getattr(config, "sliding_window", None) is None:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    windows = [kind == "sliding_attention" for kind in kinds]
    return windows if any(windows) else None


def _check(family: Family, config: Any) -> None:
    """Raise ModelError if llama.cpp would ignore a setting."""
    checks: list[Callable[[Family, Any], str | None]] = [
        _wrong_activation, _wrong_rope, _wrong_windows, _wrong_scale, _wrong_attention,
    ]  # fmt: skip
    for check in checks:
        if (problem := check(family, config)) is not None:
            raise ModelError(
                f"config.json: {problem}, which llama.cpp does not compute for {family.name}: its answers would be "
                "others. Use the merged model with a program that reads Hugging Face models"
            )


def _wrong_activation(family: Family, config: Any) -> str | None:
    used = getattr(config, "hidden_activation", None) or config.hidden_act
    return None if used == family.activation else f"the activation is {used}, not {family.activation}"


def _wrong_rope(family: Family, config: Any) -> str | None:
    rope = _rope(config)
    known: dict[str, set[str]] = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {"factor", "original_max_position_embeddings"},
    }
    kind = rope["rope_type"]
    if kind not in known or (kind == "llama3" and family.arch != "llama"):
        return f"the rotation is scaled by {kind}"
    yarn = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "truncate": True}
    plain = {"partial_rotary_factor": 1.0, **(yarn if kind == "yarn" else {})}
    others = rope.keys() - known[kind] - {"rope_type", "rope_theta"}
    if other := [name for name in sorted(others) if name not in plain or rope[name] != plain[name]]:
        return f"rope_parameters.{other[0]} is {rope[other[0]]}"
    local = config.rope_parameters.get("sliding_attention", {"rope_type": "default"})["rope_type"]
    return None if local == "default" else f"the rotation of layers with a window is scaled by {local}"


def _wrong_windows(family: Family, config: Any) -> str | None:
    windows = _windows(config)
    if family.window_every is None:
        return None
    if windows is None:
        return "no layer has a sliding window"
    expected = [number % family.window_every != 0 for number in range(1, len(windows) + 1)]
    wrong = next(
        (number for number, pair in enumerate(zip(windows, expected, strict=True)) if len({*pair}) > 1), None
    )
    return None if wrong is None else f"layer_types[{wrong}] is {config.layer_types[wrong]}"


def _wrong_scale(family: Family, config: Any) -> str | None:
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is None:
        return None
    special = family.fixed_scale == config.num_hidden_layers
    expected = config.hidden_size // config.num_attention_heads if special else _head_size(config)
    return None if math.isclose(scalar, expected) else f"query_pre_attn_scalar is {scalar}, not {expected}"


def _wrong_attention(family: Family, config: Any) -> str | None:
    if getattr(config, "use_bidirectional_attention", None):
        return "use_bidirectional_attention is true"
    if getattr(config, "attention_bias", False) and not family.biases:
        return "attention_bias is true"
    if family.arch == "gemma3":
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        return next((f"{name} is set" for name in caps if getattr(config, name, None)), None)
    if family.arch == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        return "a softcapping is missing"
    return None
