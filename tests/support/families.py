"""Tiny random models of transformers' families, built from the defaults of their configurations."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

NUM_LAYERS = 4
VOCAB_SIZE = 96

# Values for the fields that decide a model's size, by their names in all families.
_SIZES = (
    (VOCAB_SIZE, "vocab_size vocab_size_per_layer_input text_vocab_size"),
    (
        128,
        "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_sequence_length context_length",
    ),
    (
        48,
        "intermediate_size ffn_hidden_size n_inner moe_intermediate_size ffn_dim d_ff dense_intermediate_size "
        "shared_expert_intermediate_size moe_shared_expert_intermediate_size mlp_hidden_size block_ff_dim "
        "expert_ffn_hidden_size intermediate_size_mlp shared_intermediate_size decoder_ffn_dim encoder_ffn_dim "
        "dim_feedforward",
    ),
    (32, "hidden_size n_embd d_model dim n_embed lru_width out_hidden_size projection_dim mm_hidden_size"),
    (
        16,
        "sliding_window attention_window_size window_size q_lora_rank kv_lora_rank attention_chunk_size "
        "hidden_size_per_layer_input o_lora_rank mamba_chunk_size chunk_size index_topk",
    ),
    (
        8,
        "head_dim qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state "
        "ssm_state_size mamba_head_dim mamba_d_head d_head kv_channels global_head_dim index_head_dim d_kv "
        "attention_head_dim state_size rotary_dim swa_head_dim mamba_d_ssm_head",
    ),
    (6, "v_head_dim"),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "linear_num_value_heads num_local_experts n_routed_experts num_experts moe_num_experts mamba_n_heads "
        "mamba_num_heads index_n_heads swa_num_attention_heads num_swa_attention_heads n_mamba_heads "
        "time_step_rank mamba_dt_rank",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads num_experts_per_tok moe_top_k top_k linear_num_key_heads "
        "num_experts_per_token moe_k swa_num_key_value_heads depth num_global_key_value_heads experts_per_token",
    ),
    (
        1,
        "n_group topk_group n_groups mamba_n_groups n_shared_experts zero_expert_num num_shared_experts "
        "first_k_dense_replace moe_layer_start_index expert_layer_offset bos_token_id",
    ),
    (NUM_LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    (0, "pad_token_id"),
    (3, "eos_token_id"),
)
_SIZE_OF = {name: size for size, names in _SIZES for name in names.split()}


# What the sizes above do not settle.
_MAMBA = {"mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64}
_TOKENS_OF_MEDIA = {"image_token_id": 90, "audio_token_id": 91, "video_token_id": 92}
_ROPE_BY_KIND = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0}
        for kind in ("full_attention", "sliding_attention")
    }
}
_MROPE = {
    f"{family}_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": sections,
            "partial_rotary_factor": sum(sections) / 4,
        }
    }
    for family, sections in {
        "qwen2_vl": [2, 1, 1],
        "qwen2_5_vl": [2, 1, 1],
        "qwen2_5_omni": [2, 1, 1],
        "glm4v": [2, 1, 1],
        "glm_ocr": [2, 1, 1],
        "glm4v_moe": [1, 1, 0],
        "paddleocr_vl": [2, 1, 1],
    }.items()
}
_OWN_FIELDS: dict[str, dict[str, Any]] = {
    **_MROPE,
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * (NUM_LAYERS // 2)},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass_text": _ROPE_BY_KIND,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": _MAMBA,
    "gemma4": _TOKENS_OF_MEDIA,
    "gemma4_unified": _TOKENS_OF_MEDIA,
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"] * (NUM_LAYERS // 2)},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * (NUM_LAYERS // 2)},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 10,
        "laurel_rank": 4,
        "intermediate_size": 48,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_LAYERS // 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (NUM_LAYERS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (NUM_LAYERS // 2)},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mistral4": {"head_dim": 16},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * (NUM_LAYERS // 2)},
    "zaya": {"num_experts_per_tok": 1},
}


def family_names() -> list[str]:
    """Every model type of transformers that has a causal language model, alone or beside a vision tower."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    return _shrunk(CONFIG_MAPPING[model_type], **changes)


def _shrunk(kind: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    default = kind()
    fields = dict(_sizes(default))
    if hasattr(default, "is_decoder"):
        fields["is_decoder"] = True
    if "kv_lora_rank" in fields:
        # Latent attention has keys for every head.
        fields["num_key_value_heads"] = _SIZE_OF["num_attention_heads"]
    for name in kind.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig):
            fields[name] = _shrunk(type(part)).to_dict()
    fields |= _OWN_FIELDS.get(kind.model_type, {})
    return kind(**{**fields, **changes})


def _sizes(default: PretrainedConfig) -> Iterator[tuple[str, int]]:
    own = {default.attribute_map.get(name, name): size for name, size in _SIZE_OF.items()}
    for name, value in default.to_dict().items():
        if name in own and not isinstance(value, (dict, list)):
            yield name, own[name]


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    config = tiny_config(model_type, **changes)
    torch.manual_seed(0)
    # As published: a text model inside a vision-language model is stored inside it.
    beside = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind = AutoModelForImageTextToText if beside else AutoModelForCausalLM
    return kind.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def runs_alone(model_type: str) -> bool:
    """Whether a tiny model can be built from sizes alone, and transformers itself runs it on token ids."""
    try:
        model = tiny_model(model_type)
        with torch.inference_mode():
            logits_BTV = model(input_ids=torch.arange(5, 25)[None], use_cache=False).logits
    except Exception:  # noqa: BLE001 - transformers and packages that are missing raise any class
        return False
    return logits_BTV.shape[1] == 20 and bool(logits_BTV.isfinite().all())
