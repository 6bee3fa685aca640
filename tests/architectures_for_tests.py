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
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "granite": {},
    "gpt_neox": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "smollm3": {"no_rope_layer_interval": 2},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "cohere2": {"head_dim": 16, "sliding_window": 8, "logit_scale": 0.5},
}

# fmt: off
_HEAD = {"head_dim": 16}
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DELTA = {
    **_HEAD, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16, "mamba_n_groups": 1,
}
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}
_INDEXED = {"head_dim": 8, "index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}

LEAKY: dict[str, dict[str, Any]] = {
    "lfm2": {"block_ff_dim": 128, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**_SMALL_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen3_next": {**_DELTA, **_SMALL_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**_DELTA},
    "qwen3_5_moe_text": {**_DELTA, **_SMALL_EXPERTS, "shared_expert_intermediate_size": 32},
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_EXPERTS, **_MAMBA, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"],
    },
    "falcon_h1": {
        **_HEAD, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
        "mamba_d_state": 16, "mamba_chunk_size": 16, "lm_head_multiplier": 0.5, "ssm_multipliers": [0.5] * 5,
    },
    "nemotron_h": {
        **_HEAD, "hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4, "mamba_d_state": 16, "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1,
        "chunk_size": 16, "hybrid_layer_ids": [2], "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
        "attention_head_dim": 32, "kv_channels": 16, "adapter_rank": 8, "num_mem_blocks": 1,
        "num_key_value_heads": 4, "use_mem_eff_path": False,
    },
    "jamba": {
        **_EXPERTS, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16,
        "mamba_dt_rank": 8,
    },
    "mamba": {"state_size": 16, "time_step_rank": 8},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {"state_size": 16, "time_step_rank": 8},
    "recurrent_gemma": {
        **_HEAD, "lru_width": 64, "num_hidden_layers": 3, "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "minimax": {**_HEAD, **_EXPERTS, "block_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    "rwkv": {"attention_hidden_size": 64, "context_length": 256},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "embedding_dim": 64},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
}
"""Models in which a document in a row changes the next one, with transformers' own code on a CPU."""

APART: dict[str, dict[str, Any]] = {
    "ministral": _HEAD, "qwen2_moe": {**_SMALL_EXPERTS, "shared_expert_intermediate_size": 64},
    "gemma3n_text": {
        **_HEAD, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0,
        "num_hidden_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 2,
        **_WINDOW,
    },
    "gemma4_text": {
        **_HEAD, **_WINDOW, "global_head_dim": 16, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0,
    },
    "phi": {}, "phimoe": {**_EXPERTS, "lm_head_bias": False}, "gpt_neo": {
        "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8,
    },
    "gptj": {"n_embd": 64, "n_head": 4, "n_inner": 128, "n_positions": 256, "n_layer": 2, "rotary_dim": 8},
    "gpt_bigcode": {"n_embd": 64, "n_head": 4, "n_inner": 128, "n_positions": 256, "n_layer": 2},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True}, "olmo": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}, "granitemoe": {**_EXPERTS, "logits_scaling": 4.0},
    "granitemoeshared": {**_EXPERTS, "shared_intermediate_size": 64}, "cohere": {"logit_scale": 0.5},
    "stablelm": {}, "starcoder2": {"sliding_window": 8}, "glm4_moe": {**_HEAD, **_ROUTED},
    "deepseek_v2": {**_LATENT, **_ROUTED, "head_dim": 8},
    "deepseek_v3": {**_LATENT, **_ROUTED, "head_dim": 8},
    "deepseek_v32": {**_LATENT, **_ROUTED, **_INDEXED}, "glm_moe_dsa": {
        **_LATENT, **_ROUTED, **_INDEXED, "indexer_types": ["full"] * 2, "mlp_layer_types": ["dense", "sparse"],
    },
    "longcat_flash": {
        **_LATENT, "head_dim": 8, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 32, "n_routed_experts": 4,
        "zero_expert_num": 2, "moe_topk": 2, "num_layers": 2, "num_hidden_layers": 4,
    },
    "minicpm3": {**_LATENT, "scale_emb": 2, "scale_depth": 1.4, "dim_model_base": 32},
    "exaone4": {**_HEAD, **_WINDOW},
    "minimax_m2": {**_HEAD, **_EXPERTS, "rotary_dim": 8}, "ernie4_5": _HEAD,
    "hunyuan_v1_dense": _HEAD, "hunyuan_v1_moe": {
        **_HEAD, "num_experts": 4, "moe_topk": 2, "num_shared_expert": 1, "moe_intermediate_size": 32,
    },
    "seed_oss": _HEAD, "nemotron": {}, "persimmon": {"num_key_value_heads": 4}, "arcee": {}, "apertus": {},
    "diffllama": {"num_key_value_heads": 4}, "helium": _HEAD, "bitnet": {}, "llama4_text": {
        **_HEAD, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 8, "no_rope_layers": [1, 0],
    },
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "jetmoe": {**_EXPERTS, "kv_channels": 16}, "nanochat": {}, "doge": {},
    "vaultgemma": {**_HEAD, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "exaone_moe": {**_HEAD, **_SMALL_EXPERTS, "first_k_dense_replace": 1}, "hyperclovax": {"logits_scaling": 4.0},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "xglm": {"d_model": 64, "ffn_dim": 128, "attention_heads": 4, "num_layers": 2},
    "biogpt": {},
    "gpt_oss": {**_HEAD, **_EXPERTS, **_WINDOW},
    "afmoe": {**_HEAD, **_SMALL_EXPERTS, "num_dense_layers": 1},
}
"""Further models that keep the documents of a row apart, with position ids, our masks or our attention."""
# fmt: on


def config(architecture: str, **changes: Any) -> Any:
    """Return the transformers configuration of a small model; the kinds of its layers repeat in more layers."""
    own = ARCHITECTURES.get(architecture)
    if own is None:
        own = {"num_hidden_layers": 2} | (LEAKY | APART)[architecture]
    settings = _COMMON | {"num_hidden_layers": 4} | own | changes
    if kinds := settings.get("layer_types"):
        settings["layer_types"] = [kinds[i % len(kinds)] for i in range(settings["num_hidden_layers"])]
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
