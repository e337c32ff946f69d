import importlib
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.families import tiny_config
from support.family_jobs import save_tiny_family
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.target import gguf
from eagle_rpc.target.directory import resolve_model_dir
from eagle_rpc.target.loading import exact_attention, load_model
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.model_files import load_target_config, load_tokenizer

RANDOM = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def random_config(**changes):
    return TargetConfig(**{"model": "", "random": RANDOM, "dtype": DType.float32, **changes})


def fingerprint(config, cache_dir, seed=0):
    return (
        HFEagle3TargetModel.load(config, "cpu", cache_dir=cache_dir, seed=seed)
        .model_info()
        .weights_fingerprint
    )


def test_a_random_target_is_frozen_and_the_same_whatever_was_drawn_before(tmp_path):
    torch.manual_seed(1)
    first, before = fingerprint(random_config(), tmp_path), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), before), "loading must leave the caller's random state alone"
    assert fingerprint(random_config(), tmp_path) == first
    assert fingerprint(random_config(), tmp_path, seed=1) != first
    model, tokenizer = load_model(random_config(dtype=DType.bfloat16), "cpu", cache_dir=tmp_path)
    assert tokenizer is None
    assert load_tokenizer(random_config(), cache_dir=tmp_path) is None
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_target_config(random_config(), cache_dir=tmp_path).hidden_size == 32


def test_an_unknown_kind_of_random_target_is_refused(tmp_path):
    for fields in ({"model_type": "nonsense"}, {"vocab_size": 5}):
        with pytest.raises(ConfigError, match=r"target\.random must name a model_type"):
            load_model(random_config(random=fields), "cpu", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"target\.random describes a model without a directory"):
        resolve_model_dir(random_config(), tmp_path)


def test_a_directory_loads_with_its_tokenizer_in_the_asked_format(tmp_path):
    model, _ = load_model(random_config(), "cpu", cache_dir=tmp_path)
    model.save_pretrained(tmp_path / "saved")
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "hello": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "saved")
    config = TargetConfig(model=str(tmp_path / "saved"), dtype=DType.bfloat16)
    assert resolve_model_dir(config, tmp_path) == tmp_path / "saved"
    loaded, tokenizer = load_model(config, "cpu", cache_dir=tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    assert tokenizer.eos_token_id == 1
    assert HFEagle3TargetModel(loaded, tokenizer=tokenizer).model_info().tokenizer_fingerprint is not None


def test_an_interrupted_conversion_is_done_again(package, tmp_path, monkeypatch):
    def convert(source, target):
        raise KeyboardInterrupt

    config, cache = TargetConfig(model="shipped_model/tiny.gguf"), tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf, "_convert", convert)
        resolve_model_dir(config, cache)
    monkeypatch.setattr(gguf, "_convert", lambda source, target: target.mkdir())
    assert resolve_model_dir(config, cache).is_dir()


def test_pickled_weights_are_refused(tmp_path):
    model, _ = load_model(random_config(), "cpu", cache_dir=tmp_path)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    (saved / "model.safetensors").unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"target\.model must be a causal language model with safetensors weights"
    ):
        load_model(TargetConfig(model=str(saved)), "cpu", cache_dir=tmp_path)


def test_gemma2_runs_eager_where_sdpa_was_asked_for(tmp_path):
    fields = {**RANDOM, "model_type": "gemma2", "head_dim": 8}
    model, _ = load_model(random_config(random=fields), "cpu", cache_dir=tmp_path)
    assert model.config._attn_implementation == "eager"
    uncapped = {**fields, "model_type": "llama"}
    model, _ = load_model(random_config(random=uncapped), "cpu", cache_dir=tmp_path)
    assert model.config._attn_implementation == "sdpa"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with a GGUF file, which must not be imported."""
    folder = tmp_path / "site" / "shipped_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('imported')")
    (folder / "tiny.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    return folder


def test_a_file_inside_a_package_is_found_without_importing_it(package):
    assert gguf.locate_gguf("shipped_model/tiny.gguf") == package / "tiny.gguf"
    assert gguf.locate_gguf(str(package / "tiny.gguf")) == package / "tiny.gguf"
    assert "shipped_model" not in sys.modules
    for missing in (
        "shipped_model/other.gguf",
        "no_such_package/tiny.gguf",
        "/no/such/dir/tiny.gguf",
        "tiny.gguf",
    ):
        with pytest.raises(ConfigError, match=r"package/file\.gguf\) or a path, got " + missing):
            gguf.locate_gguf(missing)


def test_processes_that_start_together_convert_once(package, tmp_path, monkeypatch):
    converted, entered, go_on = [], threading.Event(), threading.Event()

    def convert(source, target):
        converted.append(source)
        entered.set()
        assert go_on.wait(20.0)
        target.mkdir()

    monkeypatch.setattr(gguf, "_convert", convert)
    config, cache, found = TargetConfig(model="shipped_model/tiny.gguf"), tmp_path / "cache", []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_model_dir(config, cache))) for _ in range(2)
    ]
    threads[0].start()
    assert entered.wait(20.0)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(20.0)
    assert len(converted) == 1
    assert found[0] == found[1]
    assert found[0].is_dir()
    (package / "tiny.gguf").write_bytes(b"other weights")
    assert resolve_model_dir(config, cache) != found[0]
    assert len(converted) == 2


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "bloom", "got_ocr2"])
def test_attention_is_eager_by_itself_where_sdpa_is_another_or_none(family: str, caplog):
    with caplog.at_level("INFO"):
        assert exact_attention(tiny_config(family), "sdpa") == "eager"
    assert "target.attention is eager: " in caplog.text and family in caplog.text
    assert exact_attention(tiny_config("llama"), "sdpa") == "sdpa"
    assert exact_attention(tiny_config(family), "flex_attention") == "flex_attention"


def test_the_text_model_of_a_vision_language_directory_is_a_target(tmp_path: Path):
    save_tiny_family("qwen2_5_vl", tmp_path / "model")
    config = TargetConfig(model=str(tmp_path / "model"), dtype=DType.float32, aux_layer_ids=[0, 1, 2])
    info = HFEagle3TargetModel.load(config, "cpu", cache_dir=tmp_path / "cache").model_info()
    assert (info.architecture, info.num_layers) == ("Qwen2_5_VLForConditionalGeneration", 4)
