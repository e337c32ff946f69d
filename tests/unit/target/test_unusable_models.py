"""A model that cannot be used is refused in one sentence: setting, rule, value, and the file at fault."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_model import save_tiny_model

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.target.loading import load_model
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.model_files import load_target_config, load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 1234\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def target(directory: Path | str) -> TargetConfig:
    return TargetConfig(model=str(directory), dtype=DType.float32)


def refusal(run, directory: Path | str) -> str:
    """The message, which has to be one paragraph that names setting and value."""
    with pytest.raises(ConfigError) as raised:
        run(target(directory))
    message = str(raised.value)
    assert message.startswith("target.model must ") and f"got {directory}" in message and "\n" not in message
    return message


def model_of(config: TargetConfig) -> None:
    load_model(config, "cpu", cache_dir="cache")


def tokenizer_of(config: TargetConfig) -> None:
    load_tokenizer(config, cache_dir="cache")


def config_of(config: TargetConfig) -> None:
    load_target_config(config, cache_dir="cache")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named_with_the_command_that_fetches_the_file(model: Path, name: str):
    (model / name).write_text(POINTER)
    for run in (config_of, tokenizer_of, model_of):
        assert refusal(run, model).endswith(f"a git-lfs pointer as {name}: run git lfs pull there")


@pytest.mark.parametrize("kept", [0, 4, 100, -8])
def test_a_part_of_a_weight_file_is_named_with_its_size(model: Path, kept: int):
    weights = model / "model.safetensors"
    content = weights.read_bytes()[:kept]
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"got {weights} of {len(content)} bytes: .*header"):
        model_of(target(model))


def test_a_model_without_weights_is_refused(model: Path):
    (model / "model.safetensors").unlink()
    refusal(model_of, model)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), "which lacks lm_head.weight"),
        (
            lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"),
            "which lacks model.layers.3.mlp.up_proj.weight",
        ),
        (lambda tensors: tensors.update(under_another_prefix(tensors)), "and 72 more"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(16)}),
            "which has model.norm.weight of shape [16] for [32]",
        ),
    ],
)
def test_a_model_that_lacks_tensors_is_refused_by_their_names(model: Path, damage, words: str):
    tensors = load_file(model / "model.safetensors")
    damage(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert refusal(model_of, model).endswith(words)


def under_another_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    moved = {f"other.{name}": tensors[name] for name in tensors}
    tensors.clear()
    return moved


def test_tensors_that_have_no_place_are_logged_unless_they_are_beside_the_text(model: Path, caplog):
    tensors = load_file(model / "model.safetensors")
    tensors |= {"model.visual.patch.weight": torch.ones(2), "score.weight": torch.ones(2)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    model_of(target(model))
    assert "has no place for score.weight, which" in caplog.text


def without_tokenizer(model: Path) -> Path:
    for file in model.glob("tokenizer*"):
        file.unlink()
    return model


def test_a_model_without_a_tokenizer_is_refused(model: Path):
    assert refusal(tokenizer_of, without_tokenizer(model)).endswith("there is no file of one")


def test_a_tokenizer_of_another_kind_is_refused_with_the_reason(model: Path):
    (model / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "Martian"}}))
    assert "must have a tokenizer that transformers loads" in refusal(tokenizer_of, model)


def test_a_tokenizer_with_code_of_its_own_is_refused_with_the_reason(model: Path):
    settings = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["my.MyTokenizer", None]}}
    (without_tokenizer(model) / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "custom code" in refusal(tokenizer_of, model)


def test_a_tokenizer_that_needs_sentencepiece_names_the_command(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("eagle_rpc.target.model_files._SENTENCEPIECE", False)
    without_tokenizer(model)
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (model / "tokenizer.model").write_bytes(b"\x0a\x0b not a model")
    assert refusal(tokenizer_of, model).endswith("needs a package: pip install sentencepiece")


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "llama"', "{}"])
def test_half_a_configuration_is_refused(model: Path, content: str):
    (model / "config.json").write_text(content)
    refusal(config_of, model)


@pytest.mark.parametrize(
    "name", ["/no/such/directory", "./nowhere", "mistyped", "organisation/mistyped", "a b"]
)
def test_a_name_that_is_neither_a_directory_nor_at_the_hub_says_so(name: str):
    for run in (config_of, tokenizer_of):
        assert "no such directory, and no hub model of that name" in refusal(run, name)


def test_an_encoder_is_refused_as_no_causal_model(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert "of type t5, which transformers does not know as one" in refusal(config_of, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [(torch.float16, "use target.dtype=bfloat16"), (torch.float32, "its weights are damaged")],
)
def test_hidden_states_that_are_not_finite_are_named_as_such(make_model, dtype: torch.dtype, advice: str):
    model = make_model("llama").to(dtype)
    largest = torch.finfo(dtype).max
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(largest)
        model.model.layers[2].mlp.up_proj.weight.fill_(largest)
    name = str(dtype).removeprefix("torch.")
    words = f"LlamaForCausalLM must give finite hidden states, they are not finite in {name}: {advice}"
    with pytest.raises(UnsupportedTarget, match=words):
        HFEagle3TargetModel(model)
