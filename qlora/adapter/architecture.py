"""Compares the configurations of bases: the values that change what a base computes with its weights."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

IGNORED = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label",
    "initializer_range", "label2id", "packed_expert", "pad_token_id", "quantization_config", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip
"""keys that change nothing of what a loaded base computes, are compared elsewhere, or change when tokens are added"""


def architecture_of(config: Any) -> str | None:
    """Return the values of transformers' configuration as JSON text, such as {"rms_norm_eps": 1e-05}; None without one.

    Nested keys are joined by dots. Values of None are left out, because another version of transformers can lack them.
    """
    if config is None or not hasattr(config, "to_dict"):
        return None
    return json.dumps(dict(sorted(_values(config.to_dict()))), default=str)


def difference(one: str, other: str) -> str | None:
    """Return the first key with different values in two such texts, with the values; None if there is none.

    Only keys that both have are compared: versions of transformers rename keys.
    """
    first, second = json.loads(one), json.loads(other)
    for key in first:
        if key in second and first[key] != second[key]:
            return f"{key}: {first[key]} and {second[key]}"
    return None


def _values(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in IGNORED or value is None:
            continue
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
