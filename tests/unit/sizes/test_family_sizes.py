"""Sizes by formula are those of the model that transformers builds."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eagle_rpc.sizes.families import sizes_by_formula
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.loading import exact_attention
from eagle_rpc.target.structure import Structure

STORED = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "rope_theta": 5000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TARGETS = [
    {"model_type": "llama"},
    {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 12, "rope_scaling": LLAMA3},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    {"model_type": "llama", "rope_theta": None, "rope_parameters": {"rope_theta": 7.0, **LLAMA3}},
    {"model_type": "mistral", "sliding_window": 8, "head_dim": None},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
]


def stored_as(changes):
    fields = {**STORED, **changes}
    return {name: value for name, value in fields.items() if (name, value) != ("rope_theta", None)}


@pytest.mark.parametrize("changes", TARGETS, ids=lambda changes: "-".join(map(str, changes.values()))[:40])
def test_the_formula_gives_the_sizes_of_the_model_that_transformers_builds(changes):
    stored = stored_as(changes)
    sizes = sizes_by_formula(stored)
    assert sizes is not None
    config = AutoConfig.for_model(**stored)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    assert sizes.shape == TargetShape.of(config)
    assert sizes.outline == Structure(model).outline(sizes.shape.experts_per_token)
    assert sizes.sdpa == (exact_attention(config, "sdpa") == "sdpa") and sizes.quantization is None


def test_a_stored_quantisation_is_told():
    stored = stored_as({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}})
    sizes = sizes_by_formula(stored)
    assert sizes is not None and sizes.quantization == {"quant_method": "gptq", "bits": 4}
    assert sizes == replace(
        sizes_by_formula(stored_as({"model_type": "llama"})), quantization=sizes.quantization
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma2"},
        {"model_type": "qwen3"},
        {"model_type": "llama", "num_key_value_heads": None},
        {"model_type": "llama", "num_attention_heads": 3},
        {"model_type": "llama", "hidden_size": "32"},
        {"model_type": "llama", "rope_theta": None},
        {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    ],
)
def test_what_the_fields_do_not_decide_is_left_to_transformers(changes):
    assert sizes_by_formula(stored_as(changes)) is None


def test_a_field_that_is_missing_is_left_to_transformers():
    for name in STORED:
        stored = stored_as({"model_type": "llama"})
        del stored[name]
        assert sizes_by_formula(stored) is None, name
