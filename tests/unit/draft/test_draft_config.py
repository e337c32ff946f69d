from dataclasses import replace

import pytest
import torch
from draft_cases import tiny_config
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.draft.rope import RotaryEmbedding, rotary_embedding
from eagle_rpc.errors import ConfigError
from eagle_rpc.supervision import TargetShape

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + place / 16 for place in range(16)],
    "long_factor": [2.0 + place for place in range(16)],
    "original_max_position_embeddings": 64,
}
KINDS = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False},
    YARN,
    LONGROPE,
    LLAMA3,
]


def target(**changes) -> TargetShape:
    fields = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "num_hidden_layers": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
    }
    return TargetShape.of(LlamaConfig(**(fields | changes)))


def test_the_draft_takes_its_shape_from_the_target():
    config = Eagle3DraftConfig.from_target(
        target(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}), draft_vocab_size=50
    )
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
        target(rope_parameters={"rope_theta": 7.0, **LLAMA3}),
        draft_vocab_size=50,
        intermediate_size=10,
        num_attention_heads=4,
        num_key_value_heads=1,
        plain_rope=True,
    )
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (10, 4, 1)
    assert config.head_dim == 8
    assert (config.rope_theta, config.rope_scaling) == (7.0, None)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"intermediate_size": None}, "intermediate_size"),
        ({"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_a_size_that_the_target_does_not_name_has_to_be_given(changes, setting):
    with pytest.raises(ConfigError, match=rf"draft\.{setting} must be given for a target of type llama"):
        Eagle3DraftConfig.from_target(replace(target(), **changes), draft_vocab_size=50)


def test_a_target_without_a_context_needs_a_longest_length():
    endless = replace(target(), context=None)
    with pytest.raises(ConfigError, match=r"target\.max_length must be given for type llama"):
        Eagle3DraftConfig.from_target(endless, draft_vocab_size=50)
    config = Eagle3DraftConfig.from_target(endless, draft_vocab_size=50, max_length=32)
    assert config.max_position_embeddings == 32


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["rope_type"])
def test_rotary_tables_equal_those_of_transformers(kind):
    reference = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 500.0, **kind},
    )
    rotary = LlamaRotaryEmbedding(reference)
    # transformers chooses factors of longrope by the last position.
    positions = torch.arange(512)[None]
    cos, sin = rotary(torch.zeros(1), positions)
    tables = RotaryEmbedding(32, 500.0, kind, context=512, length=512).tables(positions)
    torch.testing.assert_close(tables[0][0, 0], cos[0, :, :16], rtol=0, atol=1e-5)
    torch.testing.assert_close(tables[1][0, 0], sin[0, :, :16], rtol=0, atol=1e-5)


def test_plain_rotary_frequencies_are_those_of_transformers():
    expected = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=2))
    cos, _ = expected(torch.zeros(1), torch.arange(40)[None])
    tables = RotaryEmbedding(32, 10000.0, None, context=64, length=64).tables(torch.arange(40)[None])
    torch.testing.assert_close(tables[0][0, 0], cos[0, :, :16], rtol=0, atol=1e-5)


def test_longrope_takes_the_factors_of_the_length_in_use():
    def frequencies(length: int) -> torch.Tensor:
        rotary = RotaryEmbedding(32, 500.0, LONGROPE, context=512, length=length)
        return rotary.tables(torch.tensor([[1]]))[0]

    assert torch.equal(frequencies(64), frequencies(10))
    assert torch.equal(frequencies(65), frequencies(512))
    assert not torch.equal(frequencies(64), frequencies(65))
    shape = target(head_dim=32, rope_parameters={"rope_theta": 500.0, **LONGROPE})
    assert Eagle3DraftConfig.from_target(shape, draft_vocab_size=50, max_length=32).rope_length == 32


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
    ],
)
def test_values_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (
            {"rope_type": "linear"},
            r"must hold what rope_type linear needs for heads of 6, got .*'factor'.*; use draft\.rope=plain",
        ),
        ({"rope_type": "linear", "factor": -1.0}, "must hold what rope_type linear needs"),
        ({"rope_type": "martian"}, "rope_type must be one of linear, .*, got 'martian'"),
    ],
)
def test_a_rotary_embedding_that_cannot_work_is_refused(scaling, message):
    with pytest.raises(ConfigError, match=message):
        rotary_embedding(tiny_config(rope_scaling=scaling))


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_layers": 3, "norm_before_fc": True}, {"fc_norm": True, "num_aux_layers": 5, "head_dim": 2}],
)
def test_parameters_are_counted_as_the_draft_has_them(changes):
    config = tiny_config(**changes)
    draft = Eagle3Draft(config, torch.zeros(config.vocab_size, config.hidden_size))
    counts = [sum(weight.numel() for weight in draft.parameters() if weight.requires_grad)]
    draft.train_embeddings()
    counts.append(sum(weight.numel() for weight in draft.parameters() if weight.requires_grad))
    assert counts == [config.num_parameters(embedding=embedding) for embedding in (False, True)]
