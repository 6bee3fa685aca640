"""Small models of many architectures, each as a user's config.json describes it."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from qlora.recipe import Recipe

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},  # tied head
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},  # two kinds of layers, capped logits
    "gemma3_text": {"head_dim": 16, "sliding_window": 24},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_inner": 128, "n_positions": 256},  # Conv1D layers; trained in full
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "granite": {},
    "gpt_neox": {},
    "olmo2": {},
}


def config(architecture: str, **changes: Any) -> Any:
    """Return the transformers configuration of a small model."""
    settings = _COMMON | {"num_hidden_layers": 4} | ARCHITECTURES[architecture] | changes
    return AutoConfig.for_model(architecture, **settings)


def recipe(folder: Path, architecture: str, *, layers: int = 4, **sections: dict[str, Any]) -> Recipe:
    """Return a recipe for a small synthetic model; train a model in full if it cannot carry an adapter."""
    config(architecture, num_hidden_layers=layers).save_pretrained(folder)
    base: dict[str, Any] = {"model": str(folder), "init": "synthetic", "compute_dtype": "float32"}
    base["allow_unquantized"] = True  # experts are not quantized
    adapter: dict[str, Any] = {"targets": "all-linear"}
    if architecture == "gpt2":
        base["quantization"], adapter = "none", {"method": "full"}
    settings: dict[str, Any] = {
        "base": base,
        "adapter": adapter,
        "data": {"source": "someone/rows", "max_length": 64},
        "training": {"micro_batch_size": 2, "global_batch_size": 4, "device": "cpu"},
        "optimizer": {"name": "adamw"},
    }
    for section, changes in sections.items():
        settings[section] = settings[section] | changes
    return Recipe.from_dict(settings)
