"""Tiny random targets of the three tested families, and servers of them."""

import pytest
import torch
from gated_target import GatedTarget
from server_calls import Clock, config
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from eagle_rpc.supervision import Ok
from eagle_rpc.target import compiled
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.server import TargetModelServer

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
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager" if family == "gemma2" else "sdpa")


@pytest.fixture
def make_model():
    return random_model


@pytest.fixture(params=list(_CONFIGS))
def any_model(request):
    return random_model(request.param)


@pytest.fixture
def model(make_model):
    return make_model("llama")


@pytest.fixture
def trace_only(monkeypatch):
    """What is compiled is traced, guarded and counted as ever, but runs as torch does, without a minute in a C++ compiler."""
    monkeypatch.setattr(compiled, "_BACKEND", "eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def serve(clock):
    """Starts servers whose time stands still."""
    servers = []

    def start(target, **changes):
        servers.append(TargetModelServer(target, config(**changes), clock=clock))
        return servers[-1]

    yield start
    for server in servers:
        assert server.close() == Ok(True)


@pytest.fixture
def gated(model):
    target = GatedTarget(HFEagle3TargetModel(model))
    yield target
    target.opened.set()
