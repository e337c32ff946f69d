import pytest
import torch
from support.families import tiny_model
from torch import nn

from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.sizes.target import aux_layers
from eagle_rpc.target.capture import (
    AuxStates,
    captured_layers,
    check_capture,
    find_base,
    find_decoder_layers,
)


def test_default_layers_are_second_middle_and_fourth_from_the_end():
    assert aux_layers(30, None) == (1, 14, 26)
    assert aux_layers(7, None) == (1, 2, 3)


def test_named_layers_keep_their_order():
    assert aux_layers(4, [3, 0, 1]) == (3, 0, 1)
    assert aux_layers(4, [2]) == (2,)
    assert aux_layers(4, [0, 1, 2, 3]) == (0, 1, 2, 3)


@pytest.mark.parametrize("ids", [[0, 1, 1], [0, 1, 4], [-1, 0, 1], []])
def test_anything_but_distinct_layers_in_range_is_refused(ids):
    with pytest.raises(ConfigError, match=r"distinct ids in \[0, 4\), got"):
        aux_layers(4, ids)


def test_a_shallow_target_must_name_its_layers():
    with pytest.raises(
        ConfigError, match=r"shallow targets must name theirs, the default would be \[1, 2, 2\]"
    ):
        aux_layers(6, None)


def test_the_decoder_layers_are_found(any_model):
    assert find_decoder_layers(any_model) is any_model.model.layers


def test_the_text_layers_of_a_vision_language_model_are_found():
    model = tiny_model("internvl")
    assert find_base(model) is model.model
    assert find_decoder_layers(model) is model.model.language_model.layers
    assert len(model.model.vision_tower.encoder.layer) == len(model.model.language_model.layers)


def test_layers_are_those_that_run_whatever_the_config_counts():
    model = tiny_model("longcat_flash")
    assert model.config.num_hidden_layers == 2 * len(find_decoder_layers(model))


def test_an_ambiguous_structure_is_refused(make_model):
    model = make_model("llama")
    model.model.more = nn.ModuleList([*model.model.layers])
    with pytest.raises(UnsupportedTarget, match="exactly one list of decoder layers, found 2"):
        find_decoder_layers(model)
    del model.model.more, model.model.layers
    with pytest.raises(UnsupportedTarget, match="found 0"):
        find_decoder_layers(model)


def drop(place, hidden):
    """Keeps nothing."""


class Tuples(nn.Module):
    def forward(self, hidden):
        return hidden + 1, "weights"


class Fails(nn.Module):
    def forward(self, hidden):
        raise KeyError("broken layer")


def test_outputs_are_read_from_layers_that_return_tensors_or_tuples():
    layers = nn.ModuleList([nn.Identity(), Tuples(), nn.Identity()])
    hidden = torch.randn(1, 2, 4)
    captured = {}
    with captured_layers(layers, [1, 0], captured.__setitem__):
        layers[0](hidden)
        layers[1](hidden)
    assert torch.equal(captured[0], hidden + 1), "layer 1 comes first"
    assert torch.equal(captured[1], hidden)
    assert set(captured) == {0, 1}


@pytest.mark.parametrize("failing", [False, True])
def test_hooks_are_gone_afterwards_even_when_the_forward_raises(failing):
    layers = nn.ModuleList([nn.Identity(), Fails() if failing else nn.Identity(), nn.Identity()])
    hidden = torch.zeros(1, 1, 1)
    if failing:
        with pytest.raises(KeyError, match="broken layer"), captured_layers(layers, [0, 1, 2], drop):
            layers[1](hidden)
    else:
        captured = {}
        with captured_layers(layers, [0, 1, 2], captured.__setitem__):
            assert all(layer._forward_hooks for layer in layers)
        layers[0](hidden)
        assert not captured
    assert not any(layer._forward_hooks for layer in layers)


def test_hooks_are_gone_when_a_layer_id_is_wrong():
    layers = nn.ModuleList([nn.Identity()])
    with pytest.raises(IndexError), captured_layers(layers, [0, 5], drop):
        pass
    assert not layers[0]._forward_hooks


def test_a_layer_without_hidden_states_is_refused():
    layers = nn.ModuleList([nn.Identity()])
    with (
        pytest.raises(UnsupportedTarget, match=r"Identity must return hidden states \[B, T, H\]"),
        captured_layers(layers, [0], drop),
    ):
        layers[0](torch.zeros(3))


def test_states_are_written_side_by_side_without_what_pads_them():
    aux = AuxStates((3, 4), 2)
    hidden = torch.randn(2, 2, 6, 5)
    for piece, rows in enumerate((slice(0, 2), slice(2, 3))):
        aux.rows = rows
        for place in (1, 0):
            aux.write(place, hidden[piece] + place)
    expected = torch.cat([hidden[0, :, :4], hidden[1, :1, :4]])
    assert torch.equal(aux.states, torch.cat([expected, expected + 1], dim=-1))


def test_states_of_a_layer_that_did_not_run_are_refused():
    aux = AuxStates((1, 2), 3)
    aux.write(0, torch.zeros(1, 2, 4))
    aux.write(2, torch.zeros(1, 2, 4))
    with pytest.raises(UnsupportedTarget, match=r"must run in every pass, missing are numbers \[1\]"):
        _ = aux.states


def test_a_layer_that_is_skipped_or_runs_again_is_refused(make_model):
    model = make_model("llama")
    layers = find_decoder_layers(model)
    model.model.layers = nn.ModuleList([*layers[:3], *layers[:2]])
    ids = torch.arange(8)[None]
    with pytest.raises(
        UnsupportedTarget, match=r"\[0, 2, 5\] must run once in a pass, LlamaModel runs \[0, 2, 0\]"
    ):
        check_capture(model.model, layers, [0, 2, 5], ids)


def test_parallel_residual_streams_are_refused():
    model = tiny_model("gemma3n_text")
    with pytest.raises(UnsupportedTarget, match=r"must return hidden states \[B, T, H\]"):
        check_capture(model.model, model.model.layers, [0, 2, 4], torch.arange(8)[None])
