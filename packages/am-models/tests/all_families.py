"""A tiny configuration of every family that `transformers.AutoModelForCausalLM` builds.

Sizes are found by their keys in the family's default configuration; what else a family needs stands in `FURTHER`.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY, POSITIONS, WINDOW = 64, 128, 6

# By value: the keys of the many configurations that get it.
_SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size decoder_vocab_size text_vocab_size vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd dim dim_model embedding_size embed_dim emb_dim lru_width word_embed_proj_dim "
    "hidden_dim cross_attention_hidden_size",
    48: "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim dim_ff feed_forward_size ffn_hidden_size "
    "expert_ffn_hidden_size intermediate_size_mlp shared_intermediate_size shared_expert_intermediate_size",
    16: "moe_intermediate_size expert_intermediate_size moe_shared_expert_intermediate_size moe_latent_size "
    "q_lora_rank kv_lora_rank o_lora_rank mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers max_window_layers num_key_value_heads num_kv_heads n_kv_heads swa_num_key_value_heads "
    "num_global_key_value_heads num_experts_per_tok moe_topk num_experts_per_token moe_k top_k_experts moe_top_k",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads qk_rope_head_dim rotary_dim num_experts "
    "n_routed_experts num_local_experts moe_num_experts mamba_n_heads mamba_num_heads n_mamba_heads "
    "linear_num_value_heads linear_num_key_heads time_step_rank mamba_dt_rank",
    8: "head_dim attention_head_dim dim_head kv_channels d_kv v_head_dim qk_nope_head_dim global_head_dim swa_head_dim "
    "head_size index_head_dim state_size mamba_d_state ssm_state_size d_state mamba_chunk_size chunk_size block_size",
    1: "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers "
    "num_nextn_predict_layers bos_token_id",
    POSITIONS: "max_position_embeddings n_positions n_ctx max_sequence_length seq_length max_target_positions",
    WINDOW: "sliding_window attention_window_size local_attention attention_chunk_size",
    0: "pad_token_id",
}
_VALUES = {key: value for value, keys in _SIZES.items() for key in keys.split()} | {"eos_token_id": 2}

FURTHER: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1},
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "nemotron_h": {
        "layer_types": ["linear_attention", "full_attention"],
        "n_groups": 1,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_vocab_size": 30,
        "shape_vocab_size": 30,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zaya": {"num_experts_per_tok": 1},
}

# Families that read images or sound too, and configurations whose sizes are not found by their keys.
_LEFT_OUT = {
    "blt",
    "cohere_compass_text",
    "dots1",
    "gemma3n_text",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "kimi_linear",
    "moss_transcribe_diarize",
    "musicgen",
    "musicgen_melody",
    "phi4_multimodal",
    "zamba",
    "zamba2",
}
FAMILIES = sorted(
    {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in transformers.CONFIG_MAPPING}
    - set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    - _LEFT_OUT
)


def config_of(family: str, **changes: Any) -> Any:
    """The configuration, without dropout."""
    cls = transformers.CONFIG_MAPPING[family]
    defaults = cls().to_dict()
    if "kv_lora_rank" in defaults:
        # Heads of latent attention are made of what is compressed: as many of keys as of queries.
        defaults.pop("head_dim", None)
    facts: dict[str, Any] = {}
    for key, value in defaults.items():
        if key in _VALUES and isinstance(value, int):
            facts[key] = _VALUES[key]
        elif isinstance(value, float) and "drop" in key:
            facts[key] = 0.0
    if "kv_lora_rank" in defaults and "num_key_value_heads" in facts:
        facts["num_key_value_heads"] = facts["num_attention_heads"]
    return cls(**copy.deepcopy({**facts, **FURTHER.get(family, {}), **changes}))
