"""Ways to attend without transformers' masks, and the probes that decide whether a model may take them."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.target import chat_attention
from eagle_rpc.target.capture import run_base
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.probes import packing_fault

WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
IDS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1))
SEGMENTS = torch.tensor([[0] * 12, [0] * 5 + [1] * 7, [0] + [1] * 3 + [2] * 8])


@pytest.fixture
def masks(monkeypatch):
    """What transformers made masks of."""
    made, mapping = [], AttentionMaskInterface._global_mapping
    make = mapping["sdpa"]
    monkeypatch.setitem(mapping, "sdpa", lambda **settings: made.append(settings) or make(**settings))
    return made


def hidden(target, ids=IDS, segments=None):
    whole = torch.ones_like(ids)
    return target.generate_batch(ids, whole, whole, segments).last_hidden_state


@pytest.mark.parametrize(
    ("family", "changes", "spared"), [("llama", {}, True), ("qwen3", {}, True), ("qwen3", WINDOWS, False)]
)
def test_layers_that_see_everything_need_no_mask(make_model, masks, family, changes, spared):
    target = HFEagle3TargetModel(make_model(family, **changes))
    masks.clear()
    without = hidden(target)
    assert bool(masks) is not spared
    assert torch.equal(without, run_base(target.model.model, IDS))
    assert target.model.config._attn_implementation == "sdpa"


def test_a_model_that_refuses_an_attention_name_keeps_its_masks(make_model, masks, monkeypatch):
    def refuse(*args, **settings):
        raise KeyError("no such attention")

    monkeypatch.setitem(AttentionInterface._global_mapping, chat_attention.WITHOUT_MASK, refuse)
    target = HFEagle3TargetModel(make_model("llama"))
    masks.clear()
    assert torch.equal(hidden(target), run_base(target.model.model, IDS)) and masks


def attend_within_chats(query_NQD, key_NJD, value_NJD, scale):
    """What the kernel computes, which runs on GPUs only."""
    chats = chat_attention._boundaries.get()[query_NQD.device]
    bounds = chats.places.tolist()
    assert bounds[-1] == len(query_NQD) and chats.longest == max(b - a for a, b in itertools.pairwise(bounds))
    outs = []
    for start, end in itertools.pairwise(bounds):
        heads = (tensor[None, start:end].transpose(1, 2) for tensor in (query_NQD, key_NJD, value_NJD))
        outs.append(
            F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(
                0, 1
            )
        )
    return torch.cat(outs)


def test_one_kernel_for_all_chats_gives_what_each_gives_alone(make_model, masks, monkeypatch):
    monkeypatch.setattr(chat_attention, "_attend_within_chats", attend_within_chats)
    target = HFEagle3TargetModel(make_model("llama"))
    target._attention._flash = True
    hidden(target, segments=SEGMENTS)
    masks.clear()
    packed = hidden(target, segments=SEGMENTS)
    assert not masks
    for row, segments in enumerate(SEGMENTS):
        for segment in segments.unique():
            chat = segments == segment
            alone = hidden(target, IDS[row : row + 1, chat])
            torch.testing.assert_close(packed[row : row + 1, chat], alone, rtol=1e-4, atol=1e-4)


def test_a_model_that_sees_what_follows_is_refused(make_model):
    model = make_model("llama")
    model.set_attn_implementation("eager")
    model.config.is_causal = False
    with pytest.raises(
        UnsupportedTarget, match="LlamaForCausalLM must be causal, but later tokens change it"
    ):
        HFEagle3TargetModel(model)


def sums(ids_BT, segment_ids_BT):
    """A model whose state is the sum of the tokens up to it; it knows nothing of segments."""
    return ids_BT[..., None].float().cumsum(dim=1)


def places(ids_BT, segment_ids_BT):
    """A model that keeps tokens apart but counts positions along the whole row."""
    return ids_BT[..., None].float() + 100.0 * torch.arange(ids_BT.shape[1])[None, :, None]


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        (sums, "one chat changes another"),
        (places, "differs from the chat alone"),
        (lambda ids_BT, segment_ids_BT: ids_BT[..., None].float(), None),
        (lambda ids_BT, segment_ids_BT: ids_BT[..., None] * float("nan"), "nan"),
    ],
)
def test_a_packing_fault_is_named(run, fault):
    found = packing_fault(run, IDS)
    assert (found is None) if fault is None else fault in found
