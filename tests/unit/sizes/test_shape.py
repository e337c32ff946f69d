"""The shape of a target, read from the configurations of many families."""

from types import SimpleNamespace

import pytest
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma4Config,
    Glm4MoeConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    LongcatFlashConfig,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3MoeConfig,
)

from eagle_rpc.errors import ConfigError
from eagle_rpc.supervision import TargetShape

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def shape_with(**attributes) -> TargetShape:
    """Of a configuration as older files have it."""
    fields = {"model_type": "old", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 3, **attributes}
    config = SimpleNamespace(**fields)
    config.get_text_config = lambda: config
    return TargetShape.of(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), {"intermediate_size": 11008, "num_attention_heads": 32, "context": 2048}),
        (Gemma2Config(), {"head_dim": 256, "num_key_value_heads": 4, "rope_scaling": None}),
        (Qwen3_5Config(), {"vocab_size": 248320, "num_layers": 32, "model_type": "qwen3_5"}),
        (Gemma4Config(), {"head_dim": 256}),
        (LongcatFlashConfig(), {"num_layers": 28, "intermediate_size": 12 * 2048}),
        (GPT2Config(), {"hidden_size": 768, "intermediate_size": 3072, "num_layers": 12, "context": 1024}),
        (FalconConfig(), {"num_key_value_heads": 1, "intermediate_size": 4 * 4544}),
        (BloomConfig(), {"intermediate_size": None, "context": None}),
        (MptConfig(), {"context": 2048, "hidden_size": 2048}),
        (MambaConfig(), {"num_attention_heads": None, "num_key_value_heads": None, "context": None}),
        # Experts: all that a token passes.
        (MixtralConfig(), {"intermediate_size": 2 * 14336}),
        (Qwen3MoeConfig(), {"intermediate_size": 8 * 768}),
        (GptOssConfig(), {"intermediate_size": 4 * 2880}),
        (Glm4MoeConfig(num_experts_per_tok=8), {"intermediate_size": (8 + 1) * 1408}),
        (Qwen3_5MoeConfig(), {"intermediate_size": 8 * 512 + 512}),
        (Llama4TextConfig(), {"intermediate_size": 16384}),
        # Latent keys: heads as wide as the values, few key heads.
        (DeepseekV3Config(), {"head_dim": 128, "num_attention_heads": 56, "num_key_value_heads": 8}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_families_name_their_sizes_in_many_ways(config, expected):
    shape = TargetShape.of(config)
    assert {name: getattr(shape, name) for name in expected} == expected


@pytest.mark.parametrize(
    "attributes",
    [
        {"rope_theta": 7.0, "rope_scaling": LLAMA3},
        {"rope_theta": 7.0, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {"rope_theta": 7.0, **LLAMA3}},
        {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.5, **LLAMA3}},
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default"},
                "full_attention": {"rope_theta": 7.0, **LLAMA3},
            }
        },
    ],
)
def test_all_forms_of_rotary_settings_are_read(attributes):
    shape = shape_with(**attributes)
    assert (shape.rope_theta, shape.rope_scaling) == (7.0, LLAMA3)


def test_a_configuration_without_sizes_is_refused_by_their_names():
    with pytest.raises(ConfigError, match="type old without hidden_size, vocab_size"):
        shape_with(hidden_size=None, vocab_size=None)


def test_a_longest_length_is_needed_where_the_configuration_has_none():
    assert TargetShape.of(LlamaConfig()).length(None) == 2048
    assert TargetShape.of(LlamaConfig()).length(64) == 64
    with pytest.raises(ConfigError, match=r"target\.max_length must be given for type mamba"):
        TargetShape.of(MambaConfig()).length(None)
