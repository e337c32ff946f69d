"""Quantised targets, where their packages are installed, and refusals everywhere."""

import importlib.util

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from eagle_rpc.config.choices import DType, Quantization
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.target.loading import load_model
from eagle_rpc.target.model import HFEagle3TargetModel

PACKAGES = {
    Quantization.fp8: "torchao",
    Quantization.int8: "bitsandbytes",
    Quantization.int8_weights: "torchao",
    Quantization.nf4: "bitsandbytes",
}


@pytest.fixture
def saved(tmp_path):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(saved, **changes):
    config = TargetConfig(
        **{"model": str(saved), "dtype": DType.float32, "aux_layer_ids": [0, 3, 6], **changes}
    )
    model, _ = load_model(config, "cpu", cache_dir=saved)
    return model


@pytest.fixture
def without_tokenizer(monkeypatch):
    monkeypatch.setattr("eagle_rpc.target.loading.load_tokenizer", lambda config, cache_dir: None)


def hidden_of(model):
    target = HFEagle3TargetModel(model, aux_layer_ids=[0, 3, 6])
    ids = torch.arange(3, 19)[None]
    ones = torch.ones_like(ids)
    return target, target.generate_batch(ids, ones, ones).last_hidden_state


@pytest.mark.parametrize(
    "quantization", [one for one in PACKAGES if one is not Quantization.fp8], ids=lambda one: one.name
)
def test_layers_are_quantised_and_the_head_is_the_models_own(saved, quantization, without_tokenizer):
    if importlib.util.find_spec(PACKAGES[quantization]) is None:
        pytest.skip(f"needs {PACKAGES[quantization]}")
    whole, exact = hidden_of(load(saved))
    target, hidden = hidden_of(load(saved, quantization=quantization))
    error = float((hidden - exact).norm() / exact.norm())
    assert 0 < error < 0.5
    selected = torch.tensor([3, 5, 90])
    target.probe_head(selected)
    assert torch.equal(target.draft_head(selected).weight, whole.draft_head(selected).weight)
    assert target.model_info().weights_fingerprint != whole.model_info().weights_fingerprint


@pytest.mark.parametrize("quantization", [Quantization.int8, Quantization.nf4], ids=lambda one: one.name)
def test_weights_that_are_stored_quantised_load_as_they_are(saved, tmp_path, quantization, without_tokenizer):
    pytest.importorskip("bitsandbytes")
    load(saved, quantization=quantization).save_pretrained(tmp_path / "quantised")
    _, before = hidden_of(load(saved, quantization=quantization))
    _, after = hidden_of(load(tmp_path / "quantised"))
    assert torch.equal(before, after)
    with pytest.raises(
        ConfigError,
        match=r"target\.quantization must be null for a model whose weights are stored quantised, got nf4",
    ):
        load(tmp_path / "quantised", quantization=Quantization.nf4)


def test_a_quantization_that_this_machine_lacks_is_refused_by_name(saved):
    for quantization, package in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            with pytest.raises(ConfigError, match=rf"target\.quantization.*{quantization.name}.*{package}"):
                load(saved, quantization=quantization)
    if importlib.util.find_spec("torchao") is not None:
        with pytest.raises(
            ConfigError, match=r"target\.quantization must be one that this machine runs on cpu, got fp8"
        ):
            load(saved, quantization=Quantization.fp8)


def test_a_random_target_is_not_quantised(tmp_path):
    with pytest.raises(ConfigError, match=r"target\.quantization must be null for a random model, got nf4"):
        load(tmp_path, random={"model_type": "llama"}, quantization=Quantization.nf4)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantised_head_is_refused_with_advice(make_model, dtype):
    model = make_model("llama")
    target = HFEagle3TargetModel(model, aux_layer_ids=[0, 3, 6])
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedTarget, match=r"no plain linear layer; use supervision\.encoding=logits"):
        target.draft_head(torch.tensor([1]))


@pytest.mark.parametrize("attention", ["nonsense", "some-kernels/attention"])
def test_an_attention_that_transformers_has_not_got_here_is_refused_by_name(saved, attention):
    with pytest.raises(
        ConfigError,
        match=rf"target\.attention must be an implementation that runs llama here, got {attention}",
    ):
        load(saved, attention=attention)
