"""Quantised targets on a GPU, where their packages are installed: near the whole one, and the same bits each time."""

import importlib.util

import pytest
import torch
from gpu_marks import ON_A_GPU
from gpu_targets import MAPPING, RANDOM, batch_of, config_of
from transformers import LlamaConfig, LlamaForCausalLM

from eagle_rpc.config.choices import Quantization
from eagle_rpc.supervision import DraftVocabOnDevice, supervise
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.probes import relative_error

pytestmark = ON_A_GPU

PACKAGES = {"fp8": "torchao", "int8": "bitsandbytes", "int8_weights": "torchao", "nf4": "bitsandbytes"}
COMPILED = {"compile_shapes": ["4x256"]}


@pytest.fixture(autouse=True)
def own_compiled_code():
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    shape = {name: value for name, value in RANDOM.items() if name != "model_type"}
    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(directory)
    return directory


def load(stored, monkeypatch, **changes):
    monkeypatch.setattr("eagle_rpc.target.loading.load_tokenizer", lambda config, cache_dir: None)
    config = config_of("fused", model=str(stored), random={}, **changes)
    return HFEagle3TargetModel.load(config, "cuda", cache_dir=stored)


def supervision_of(target):
    vocab = DraftVocabOnDevice.of(MAPPING, torch.device("cuda"))
    return supervise(target, batch_of(4, 256), vocab, encoding="logits", rows="loss_mask", chunk_rows=300)


@pytest.mark.parametrize("form", [{}, COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize("quantization", PACKAGES)
def test_a_quantised_target_is_near_the_whole_one_and_always_the_same(
    stored, quantization, form, monkeypatch
):
    if importlib.util.find_spec(PACKAGES[quantization]) is None:
        pytest.skip(f"needs {PACKAGES[quantization]}")
    if quantization == "int8" and form:
        pytest.skip("bitsandbytes looks for outliers, which does not compile whole")
    exact = supervision_of(load(stored, monkeypatch))
    target = load(stored, monkeypatch, quantization=Quantization[quantization], **form)
    quantised, again = supervision_of(target), supervision_of(target)
    # Errors of four bits add up over the layers; unrelated states would differ by 1.4.
    assert 0 < relative_error(quantised.aux, exact.aux) < 0.7
    assert 0 < relative_error(quantised.values, exact.values) < 0.7
    for name in ("aux", "values", "log_normalizer", "argmax"):
        assert torch.equal(getattr(quantised, name), getattr(again, name))
