"""`HFEagle3TargetModel` against the stock full forward with all hidden states.

Legend: B batch, T sequence, H target hidden, V target vocab.
"""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.target import model as model_module
from eagle_rpc.target.chat_attention import positions_within_chats
from eagle_rpc.target.model import HFEagle3TargetModel

LAYERS = [0, 3, 6]


def ids_of(batch=2, length=12, seed=0):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(target, ids, segment_ids=None, attention_mask=None):
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    packing = {} if segment_ids is None else {"segment_ids": segment_ids}
    return target.generate_batch(ids, mask, mask, **packing)


def logits_of(output):
    batch, length, _ = output.last_hidden_state.shape
    return output.project(output.last_hidden_state.flatten(0, 1)).view(batch, length, -1)


def assert_close(actual, expected):
    assert torch.allclose(actual, expected, atol=1e-4, rtol=1e-4)


def test_aux_and_logits_are_those_of_the_full_forward(any_model):
    output = run(HFEagle3TargetModel(any_model, aux_layer_ids=LAYERS), ids_of())
    with torch.no_grad():
        full = any_model(ids_of(), output_hidden_states=True)
    # hidden_states[0] is the embedding; the last entry has passed the final norm, so layer 6 is compared
    # below.
    assert torch.equal(
        output.aux_hidden_states[..., :64], torch.cat([full.hidden_states[i] for i in (1, 4)], dim=-1)
    )
    assert torch.equal(any_model.model.norm(output.aux_hidden_states[..., 64:]), full.hidden_states[7])
    assert torch.equal(output.last_hidden_state, full.hidden_states[7])
    assert torch.equal(logits_of(output), full.logits)


def test_padding_changes_nothing_at_real_tokens(any_model):
    target = HFEagle3TargetModel(any_model, aux_layer_ids=LAYERS)
    mask = (torch.arange(12)[None] < torch.tensor([[12], [7]])).long()
    padded = run(target, ids_of(), attention_mask=mask)
    alone = run(target, ids_of()[1:, :7])
    assert_close(padded.aux_hidden_states[1, :7], alone.aux_hidden_states[0])
    assert_close(padded.last_hidden_state[1, :7], alone.last_hidden_state[0])


def test_packed_chats_are_what_they_are_alone(any_model):
    """Padding after the last chat; chats longer than Gemma's sliding window; a chat of one token."""
    target = HFEagle3TargetModel(any_model, aux_layer_ids=LAYERS)
    ids = ids_of(2, 14)
    segments = torch.tensor([[0] * 6 + [1] * 8, [4] * 1 + [5] * 9 + [0] * 4])
    mask = torch.tensor([[1] * 14, [1] * 10 + [0] * 4])
    packed = run(target, ids, segments, mask)
    for row, chat in ((0, slice(0, 6)), (0, slice(6, 14)), (1, slice(0, 1)), (1, slice(1, 10))):
        alone = run(target, ids[row : row + 1, chat])
        assert_close(packed.aux_hidden_states[row, chat], alone.aux_hidden_states[0])
        assert_close(packed.last_hidden_state[row, chat], alone.last_hidden_state[0])


def test_positions_restart_at_each_segment_and_at_padding():
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    segments = torch.tensor([[0, 0, 0, 1, 2, 2], [3, 3, 3, 3, 3, 3]])
    assert positions_within_chats(real, segments).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1]]


def test_a_model_that_mixes_packed_chats_is_refused(make_model, monkeypatch):
    target = HFEagle3TargetModel(make_model("llama"))
    monkeypatch.setattr(
        model_module,
        "positions_within_chats",
        lambda real, segments: torch.arange(real.shape[1]).expand_as(real),
    )
    with pytest.raises(UnsupportedTarget, match="does not keep packed chats apart"):
        run(target, ids_of(), torch.tensor([[0] * 6 + [1] * 6] * 2))


def test_soft_capped_attention_under_sdpa_is_refused(make_model):
    model = make_model("gemma2")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedTarget, match=r"use target\.attention=eager"):
        HFEagle3TargetModel(model)


def test_hooks_are_gone_when_the_forward_raises(make_model, monkeypatch):
    model = make_model("llama")
    target = HFEagle3TargetModel(model)

    def fail(*args, **kwargs):
        raise ZeroDivisionError("in a layer")

    monkeypatch.setattr(model.model.layers[5], "forward", fail)
    with pytest.raises(ZeroDivisionError):
        run(target, ids_of())
    assert not any(layer._forward_hooks for layer in model.model.layers)
    monkeypatch.undo()
    assert run(target, ids_of()).last_hidden_state.shape == (2, 12, 32)


def test_the_model_is_frozen_and_keeps_its_own_decoder(make_model):
    model = make_model("llama").train()
    decoder = model.model
    target = HFEagle3TargetModel(model)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert target.model.model is decoder
    assert "forward" not in vars(decoder)


def test_supervision_may_be_saved_for_backward(make_model):
    output = run(HFEagle3TargetModel(make_model("llama")), ids_of())
    weight = nn.Parameter(torch.ones(96, 1))
    (output.aux_hidden_states @ weight).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_the_default_layers_and_a_shallow_target(make_model):
    assert HFEagle3TargetModel(make_model("llama")).aux_layer_ids == (1, 2, 3)
    with pytest.raises(ConfigError, match="shallow targets must name theirs"):
        HFEagle3TargetModel(make_model("llama", num_hidden_layers=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_draft_head_is_the_models_own(any_model, dtype):
    any_model.to(dtype)
    target = HFEagle3TargetModel(any_model, aux_layer_ids=LAYERS)
    selected = torch.tensor([3, 5, 90])
    target.probe_head(selected)
    hidden_NH = run(target, ids_of()).last_hidden_state.flatten(0, 1)
    expected = target._own_head.project(hidden_NH)[:, selected]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert torch.allclose(
        target.draft_head(selected).project(hidden_NH), expected, atol=tolerance, rtol=tolerance
    )


def test_gemma2_embeddings_are_raw_and_its_cap_is_in_the_draft_head(make_model):
    target = HFEagle3TargetModel(make_model("gemma2"))
    embedding = target.get_input_embeddings()
    assert torch.allclose(embedding(torch.tensor([7])), embedding.weight[7] * 32**0.5)
    assert target.draft_head(torch.tensor([1])).soft_cap == 5.0


class HiddenScale(LlamaForCausalLM):
    """A factor on what the head reads that no config field names."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.25
        return output


class HiddenCap(LlamaForCausalLM):
    """A soft cap far above the small logits of a random model."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 150) * 150
        return output


@pytest.mark.parametrize("kind", [HiddenScale, HiddenCap])
def test_a_head_that_cannot_be_rebuilt_is_refused_but_projects_right(make_model, kind):
    config = make_model("llama", initializer_range=0.02).config
    model = kind(config)
    target = HFEagle3TargetModel(model)
    with pytest.raises(UnsupportedTarget, match=r"use supervision\.encoding=logits"):
        target.probe_head(torch.arange(0, 97, 2))
    output = run(target, ids_of())
    with torch.no_grad():
        assert_close(logits_of(output), model(ids_of()).logits)


class BiasedHead(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)


def test_a_bias_is_part_of_the_draft_head(make_model):
    target = HFEagle3TargetModel(BiasedHead(make_model("llama").config))
    assert target.draft_head(torch.tensor([4, 9])).bias.shape == (2,)
    target.probe_head(torch.tensor([4, 9]))


class NoLinearHead(LlamaForCausalLM):
    def get_output_embeddings(self):
        return None


def test_a_head_without_rows_is_refused(make_model):
    with pytest.raises(UnsupportedTarget, match=r"no plain linear layer; use supervision\.encoding=logits"):
        HFEagle3TargetModel(NoLinearHead(make_model("llama").config)).probe_head(torch.tensor([1]))


class ReadsMore(LlamaForCausalLM):
    """Its logits depend on more than the last hidden state."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if kwargs.get("input_ids") is not None:
            output.logits = output.logits + kwargs["input_ids"].unsqueeze(-1)
        return output


def test_a_model_whose_logits_need_more_than_hidden_states_is_refused(make_model):
    with pytest.raises(UnsupportedTarget, match="does not work on last hidden states alone"):
        HFEagle3TargetModel(ReadsMore(make_model("llama").config))


def test_model_info_tells_targets_apart(make_model):
    info = HFEagle3TargetModel(make_model("llama"), aux_layer_ids=LAYERS).model_info()
    assert (info.architecture, info.vocab_size, info.hidden_size, info.num_layers) == (
        "LlamaForCausalLM",
        97,
        32,
        7,
    )
    assert (info.aux_layer_ids, info.dtype, info.max_length) == ((0, 3, 6), "float32", 64)
    assert info.tokenizer_fingerprint is None
    same, changed = make_model("llama"), make_model("llama")
    changed.lm_head.weight.data.mul_(1.01)
    assert HFEagle3TargetModel(same).model_info().weights_fingerprint == info.weights_fingerprint
    assert HFEagle3TargetModel(changed).model_info().weights_fingerprint != info.weights_fingerprint
    assert HFEagle3TargetModel(same).model_info().incarnation != info.incarnation
