"""`longrope` by configuration: a long chat changes no other."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config, PhimoeConfig

from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.target.longrope import settle_longrope
from eagle_rpc.target.model import HFEagle3TargetModel

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 16,
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def model(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Phi3Config(**SIZES, rope_parameters=LONGROPE), **changes)


def hidden_of(target: HFEagle3TargetModel, length: int) -> torch.Tensor:
    """Last hidden states of a short chat beside one of `length` tokens."""
    ids = torch.arange(2 * length).view(2, length) % 97
    real = torch.ones_like(ids)
    real[0, 8:] = 0
    return target.generate_batch(ids, real, real).last_hidden_state[0, :8]


@pytest.mark.parametrize("length", [16, 64])
def test_a_long_chat_changes_no_other(length: int):
    settled = model()
    settle_longrope(settled, length)
    target = HFEagle3TargetModel(settled, aux_layer_ids=[0, 1, 2])
    ids = torch.arange(8)[None]
    alone = target.generate_batch(ids, torch.ones_like(ids), torch.ones_like(ids)).last_hidden_state[0]
    torch.testing.assert_close(hidden_of(target, 12), alone)
    torch.testing.assert_close(hidden_of(target, 40), alone)


def test_the_length_in_use_decides_and_not_the_batch():
    tables = []
    for length in (16, 17):
        settled = model()
        settle_longrope(settled, length)
        tables.append(settled.model.rotary_emb(torch.zeros(1), torch.arange(8)[None])[0])
    untouched = model().model.rotary_emb
    short, long = (untouched(torch.zeros(1), torch.arange(last)[None])[0][:, :8] for last in (8, 17))
    assert torch.equal(tables[0], short) and torch.equal(tables[1], long)


def test_a_module_that_looks_at_the_batch_all_the_same_is_refused():
    parameters = {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.5}
    config = PhimoeConfig(**SIZES, num_local_experts=2, rope_parameters=parameters)
    with pytest.raises(UnsupportedTarget, match="PhimoeRotaryEmbedding must rotate a chat alike beside any"):
        settle_longrope(AutoModelForCausalLM.from_config(config), 64)
