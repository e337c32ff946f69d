from types import SimpleNamespace

import pytest
import torch
from draft_cases import tiny_config
from transformers import Gemma2Config, LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eagle_rpc.draft import Eagle3DraftConfig
from eagle_rpc.draft.rope import RotaryEmbedding
from eagle_rpc.errors import ConfigError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def target(**changes) -> SimpleNamespace:
    fields = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
    }
    return SimpleNamespace(**(fields | changes))


def test_the_draft_takes_its_shape_from_the_target():
    config = Eagle3DraftConfig.from_target(target(rope_theta=5000.0), draft_vocab_size=50)
    assert config == Eagle3DraftConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
        draft_vocab_size=50,
        rms_norm_eps=1e-6,
        rope_theta=5000.0,
        rope_scaling=None,
        max_position_embeddings=512,
    )


def test_overrides_win_over_the_target():
    config = Eagle3DraftConfig.from_target(
        target(),
        draft_vocab_size=50,
        intermediate_size=10,
        num_attention_heads=4,
        num_key_value_heads=1,
        norm_before_residual=True,
    )
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (10, 4, 1)
    assert config.norm_before_residual
    assert config.head_dim == 8


@pytest.mark.parametrize(
    "attributes",
    [
        {"rope_theta": 7.0, "rope_scaling": LLAMA3},
        {"rope_theta": 7.0, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {"rope_theta": 7.0, **LLAMA3}},
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default"},
                "full_attention": {"rope_theta": 7.0, **LLAMA3},
            }
        },
    ],
)
def test_both_forms_of_rotary_settings_are_read(attributes):
    config = Eagle3DraftConfig.from_target(target(**attributes), draft_vocab_size=50)
    assert config.rope_theta == 7.0
    assert config.rope_scaling == LLAMA3


def test_real_configs_of_other_families_give_a_llama_draft():
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    for family in (LlamaConfig, Qwen3Config, Gemma2Config):
        config = Eagle3DraftConfig.from_target(family(**shape, head_dim=32), draft_vocab_size=50)
        assert (config.head_dim, config.hidden_act, config.rope_theta) == (32, "silu", 10000.0)
        assert config.rope_scaling is None


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_rotary_frequencies_equal_those_of_transformers(scaling):
    parameters = {"rope_theta": 500.0, **(scaling or {"rope_type": "default"})}
    reference = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=parameters)
    if scaling is None:
        expected = 1.0 / 500.0 ** (torch.arange(0, 32, 2).float() / 32)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](reference, device="cpu")
    cos, sin = RotaryEmbedding(32, 500.0, scaling).tables(torch.arange(40)[None])
    angles = torch.arange(40).float()[:, None] * expected
    torch.testing.assert_close(cos[0, 0], angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[0, 0], angles.sin(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({"draft_vocab_size": 24}, "draft_vocab_size must be at most the target's 23, got 24"),
        (
            {"num_attention_heads": 5},
            "num_attention_heads must be a multiple of num_key_value_heads 2, got 5",
        ),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu .*, got 'gelu'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type must be one of linear, llama3, got 'yarn'",
        ),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            "rope_scaling.factor must be a positive number .*, got None",
        ),
        (
            {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor must be above low_freq_factor 1.0, got 1.0",
        ),
    ],
)
def test_values_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)
