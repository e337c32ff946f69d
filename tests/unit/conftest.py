"""Tiny random targets of the three tested families."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
# The sliding window is shorter than the sequences of the tests; the caps are low enough to matter.
_CONFIGS = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gemma2": (
        Gemma2Config,
        {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
}


def random_model(family: str, **changes):
    config_class, fields = _CONFIGS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config_class(**{**_COMMON, **fields, **changes})
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="eager" if family == "gemma2" else "sdpa"
        )


@pytest.fixture
def make_model():
    return random_model


@pytest.fixture(params=list(_CONFIGS))
def any_model(request):
    return random_model(request.param)


@pytest.fixture
def model(make_model):
    return make_model("llama")
