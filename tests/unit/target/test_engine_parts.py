"""What a target in an engine needs beside the engine: embedding and head from files, chats, the check at start."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_model import save_tiny_model
from transformers.modeling_outputs import BaseModelOutputWithPast

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.supervision import TargetOutput
from eagle_rpc.target.beside_decoder import StoredTensors, load_beside_decoder
from eagle_rpc.target.engine_check import load_reference
from eagle_rpc.target.lm_head import OwnHead, draft_head
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.model_files import load_target_config
from eagle_rpc.target.vllm_target import chats_of

AUX = (1, 3, 4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def config_of(directory, dtype=DType.float32):
    return TargetConfig(model=str(directory), dtype=dtype, device="cpu", aux_layer_ids=list(AUX))


def states_of(target, ids_T) -> torch.Tensor:
    ones = torch.ones_like(ids_T)[None]
    output = target.generate_batch(ids_T[None], ones, ones)
    assert isinstance(output, TargetOutput)
    return torch.cat((output.aux_hidden_states[0], output.last_hidden_state[0]), dim=-1)


def beside_decoder(directory):
    config = config_of(directory)
    hf_config = load_target_config(config, cache_dir="unused")
    return load_beside_decoder(config, hf_config, StoredTensors(directory), CPU)


def test_embedding_and_head_are_those_of_the_whole_model(directory):
    whole = HFEagle3TargetModel.load(config_of(directory), CPU, cache_dir="unused")
    model, selected = beside_decoder(directory), torch.arange(0, 40, 3)
    assert torch.equal(model.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    assert torch.equal(draft_head(model, selected).weight, whole.draft_head(selected).weight)
    hidden_NH = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    own_head = OwnHead(model, BaseModelOutputWithPast)
    assert torch.equal(own_head.project(hidden_NH), whole._own_head.project(hidden_NH))
    assert next(model.model.layers.parameters()).is_meta


def test_a_fingerprint_tells_weights_of_layers_apart(directory, tmp_path):
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    before = StoredTensors(directory).fingerprint()
    assert StoredTensors(tmp_path).fingerprint() == before
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert StoredTensors(tmp_path).fingerprint() != before


def test_weights_inside_another_model_are_found_by_their_last_two_parts_if_one_has_them(tmp_path):
    tensors = {
        name: torch.zeros(1)
        for name in ("language_model.model.embed.weight", "a.norm.weight", "b.norm.weight")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    stored = StoredTensors(tmp_path)
    assert stored.find("model.language_model.embed.weight") == "language_model.model.embed.weight"
    assert stored.find("model.norm.weight") is None
    assert stored.find("model.bed.weight") is None


def test_a_head_that_is_not_stored_is_named(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"must hold lm_head\.weight for target\.engine=vllm, got no tensor"
    ):
        beside_decoder(tmp_path)


def test_chats_are_the_real_tokens_of_rows_cut_where_the_segment_changes():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert list(chats_of(mask, None)) == [(0, slice(0, 5)), (1, slice(0, 2))]
    segments = torch.tensor([[0, 0, 1, 2, 2], [5, 5, 5, 6, 6]])
    found = [(0, slice(0, 2)), (0, slice(2, 3)), (0, slice(3, 5)), (1, slice(0, 2))]
    assert list(chats_of(mask, segments)) == found


@pytest.mark.parametrize("dtype", [DType.float32, DType.bfloat16])
def test_the_check_takes_transformers_states_and_no_other_layers(directory, tmp_path, dtype):
    config = config_of(directory, dtype)
    reference = load_reference(config, [CPU], AUX, fingerprint="one", cache_dir=tmp_path)
    target = HFEagle3TargetModel.load(config, CPU, cache_dir="unused")
    reference.check_states(states_of(target, reference.ids), "the engine")
    reference.check_head(target._own_head.project(reference.last_hidden))
    for shift in (-1, 1):
        shifted = [layer + shift for layer in AUX]
        other = HFEagle3TargetModel.load(
            dataclasses.replace(config, aux_layer_ids=shifted), CPU, cache_dir="unused"
        )
        with pytest.raises(UnsupportedTarget, match="the engine must give the hidden states of transformers"):
            reference.check_states(states_of(other, reference.ids), "the engine")
    with pytest.raises(UnsupportedTarget, match="the stored head must be the model's own"):
        reference.check_head(target._own_head.project(reference.last_hidden) + 1)


def test_the_check_refuses_states_that_are_not_numbers(directory, tmp_path):
    reference = load_reference(config_of(directory), [CPU], AUX, fingerprint="one", cache_dir=tmp_path)
    with pytest.raises(UnsupportedTarget, match="relative errors"):
        reference.check_states(reference.states * float("nan"), "the engine")


def test_a_reference_is_made_once(directory, tmp_path, monkeypatch):
    first = load_reference(config_of(directory), [CPU], AUX, fingerprint="one", cache_dir=tmp_path)
    monkeypatch.setattr(HFEagle3TargetModel, "load", None)
    again = load_reference(config_of(directory), [CPU], AUX, fingerprint="one", cache_dir=tmp_path)
    assert torch.equal(first.states, again.states)
