"""Tiny configurations: any model type with a few small layers, from the attributes of its own configuration."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

VOCABULARY = 2048
"""tokens, as many as the bundled tokenizer has"""

_SIZES: Mapping[int, str] = {
    64: """hidden_size n_embd d_model embedding_dim attention_hidden_size lru_width mamba_d_ssm word_embed_proj_dim
        ple_embed_dim router_hidden_size""",
    128: """intermediate_size ffn_dim n_inner dff dim_ff block_ff_dim ffn_hidden_size intermediate_size_mlp
        dense_intermediate_size""",
    32: """moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank
        vocab_size_per_layer_input dim_model_base""",
    16: """head_dim global_head_dim swa_head_dim v_head_dim kv_lora_rank index_head_dim linear_key_head_dim
        linear_value_head_dim linear_head_dim mamba_d_state mamba_d_head mamba_chunk_size mamba_head_dim mamba_headdim
        ssm_state_size state_size chunk_size block_size kv_channels dim_head hidden_size_per_layer_input
        query_pre_attn_scalar o_lora_rank swa_v_head_dim""",
    8: """qk_rope_head_dim qk_nope_head_dim sliding_window window_size sliding_window_size attention_window_size
        local_attention attention_chunk_size rotary_dim time_step_rank mamba_dt_rank mamba_n_heads mamba_num_heads
        laurel_rank adapter_rank gated_norm_rank hc_lowrank loop_gate_rank d_rel""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads linear_num_value_heads linear_num_heads
        swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts""",
    2: """num_hidden_layers n_layer n_layers num_layers num_blocks num_key_value_heads num_kv_heads index_n_heads
        swa_num_key_value_heads linear_num_key_heads num_experts_per_tok num_experts_per_token moe_topk moe_k
        zero_expert_num""",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups n_shared_experts num_shared_experts",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length",
    VOCABULARY: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
}  # fmt: skip
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
"""attribute of a configuration -> its value, if the configuration of a model type has it"""

LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types")
"""attributes with the kind of each layer: a tiny model has a layer of each kind"""

_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
_HEAD = {"head_dim": 16}
_PART = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128,
}  # fmt: skip
_ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "attention_head_dim": 32,
    "attention_hidden_size": 128, "num_key_value_heads": 4,
}  # fmt: skip
HINTS: Mapping[str, Mapping[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "vocab_size": VOCABULARY, "local_attention_window_len": 16, "encoder_hash_byte_group_vocab": 64,
        "patcher_config": {**_PART, "num_hidden_layers": 1}, "global_config": {**_PART, "hidden_size": 128},
        "encoder_config": {**_PART, "hidden_size_global": 128}, "decoder_config": {**_PART, "hidden_size_global": 128},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dory": {
        "num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {
        **_LATENT, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_n_heads": 4, "lm_head_multiplier": 0.5, "ssm_multipliers": [0.5] * 5},
    "gemma3n_text": {"num_kv_shared_layers": 0, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 2},
    "gemma4_text": {"num_kv_shared_layers": 0, "global_head_dim": 16},
    "gemma4_unified_text": {"num_kv_shared_layers": 0, "global_head_dim": 16},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "inkling2_loop_text": {
        "num_hidden_layers": 4, "loop_layer_index_start": 1, "loop_layer_index_end": 3,
        "n_layers_per_attn_res_block": 1, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**_LATENT, "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8, "time_step_rank": 8},
    "ministral": _HEAD,
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "youtu": _LATENT,
    "zamba": {**_ZAMBA, "n_mamba_heads": 2, "use_mamba_kernels": False},
    "zamba2": {
        **_ZAMBA, "hybrid_layer_ids": [1, 3], "num_mem_blocks": 1, "n_mamba_heads": 8, "mamba_ngroups": 1,
        "use_mem_eff_path": False,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""model type -> what its configuration needs in addition"""


def config(model_type: str, **changes: Any) -> Any:
    """Return transformers' configuration of a tiny model, with changes of single attributes."""
    default = AutoConfig.for_model(model_type)
    known = {**default.to_dict(), **{name: getattr(default, name) for name in default.attribute_map}}
    sizes = {name: size for name, size in SIZES.items() if known.get(name) is not None}
    settable = [
        name for name in LISTS
        if name not in default.attribute_map and not isinstance(getattr(type(default), name, None), property)
    ]  # fmt: skip
    kinds = {name: list(dict.fromkeys(known[name])) for name in settable if known.get(name)}
    layers = max([2, *map(len, kinds.values())])
    sizes |= {name: layers for name in ("num_hidden_layers", "num_layers", "n_layer") if name in sizes}
    listed = {name: [kinds[name][min(i, len(kinds[name]) - 1)] for i in range(layers)] for name in kinds}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(
        model_type, **{**tokens, **sizes, **listed, **HINTS.get(model_type, {}), **changes}
    )
