"""Packed rows against their chats alone, for each way to attend and each encoding."""

import pytest
import torch
from transformers.integrations import sdpa_attention

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.data.collate import collate
from eagle_rpc.data.dataset import Example
from eagle_rpc.supervision import Eagle3TargetBatch, SessionSettings, TokenBatch, VocabMapping
from eagle_rpc.target import chat_attention
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

MAPPING = VocabMapping.from_token_ids(torch.arange(0, 97, 3), 97)
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
# Family, attention, changes of the model; Gemma 2 caps its scores, which sdpa cannot.
TARGETS = {
    "llama, sdpa": ("llama", "sdpa", {}),
    "llama, eager": ("llama", "eager", {}),
    "qwen3, sdpa": ("qwen3", "sdpa", {}),
    "qwen3 with windows, sdpa": ("qwen3", "sdpa", SLIDING),
    "qwen3 with windows, eager": ("qwen3", "eager", SLIDING),
    "gemma2, eager": ("gemma2", "eager", {}),
}
# Chats longer and shorter than the windows, one of a single token, and padding after some rows.
ROWS = [[9, 6], [1, 11, 2], [4, 5]]
LENGTH = 16


def chats() -> list[list[Example]]:
    generator = torch.Generator().manual_seed(3)

    def chat(length: int) -> Example:
        ids = torch.randint(3, 97, (length,), generator=generator)
        return Example(ids, torch.rand(length, generator=generator) < 0.8)

    return [[chat(length) for length in row] for row in ROWS]


def make_target(make_model, family: str, attention: str, changes: dict) -> HFEagle3TargetModel:
    model = make_model(family, **changes)
    model.set_attn_implementation(attention)
    return HFEagle3TargetModel(model)


def supervise(target: HFEagle3TargetModel, tokens: TokenBatch, encoding: str) -> Eagle3TargetBatch:
    backend = ColocatedEagle3TargetModel(
        target, TargetConfig(model="tiny", chunk_rows=5), SessionSettings(encoding=encoding, rows="loss_mask")
    )
    backend.open_session(MAPPING)
    return backend.generate_batch(
        tokens.input_ids, tokens.attention_mask, tokens.loss_mask, tokens.segment_ids
    )


def by_place(batch: Eagle3TargetBatch, places: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """What training reads of chats at (row, start, length), one chat after the other."""
    dense = {
        "log_normalizer": batch.log_normalizer,
        "argmax": batch.argmax,
        "probs": batch.targets.probs(slice(None)),
    }
    rows = {int(row): n for n, row in enumerate(batch.supervised_rows)}
    width = batch.input_ids.shape[1]
    order = [
        rows.pop(r * width + t)
        for r, start, length in places
        for t in range(start, start + length)
        if r * width + t in rows
    ]
    assert not rows, "rows outside of every chat"
    aux = torch.cat([batch.aux_hidden_states[r, start : start + length] for r, start, length in places])
    return {"aux": aux, **{name: tensor[order] for name, tensor in dense.items()}}


@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
@pytest.mark.parametrize("name", TARGETS)
def test_supervision_of_a_packed_chat_is_that_of_the_chat_alone(make_model, name, encoding):
    target = make_target(make_model, *TARGETS[name])
    rows = chats()
    packed = supervise(target, collate(rows, LENGTH, packed=True), encoding)
    places = [(r, sum(row[:n]), length) for r, row in enumerate(ROWS) for n, length in enumerate(row)]
    alone = supervise(
        target, collate([[chat] for row in rows for chat in row], max(map(max, ROWS)), packed=False), encoding
    )
    expected = by_place(alone, [(n, 0, length) for n, (_, _, length) in enumerate(places)])
    assert len(expected["argmax"]) > 20
    for key, tensor in by_place(packed, places).items():
        torch.testing.assert_close(
            tensor, expected[key], rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("changes", [{}, SLIDING])
def test_sdpa_attends_within_chats_only(make_model, monkeypatch, changes):
    """No [T, T] mask: a mask only where a window is shorter than the chat, and never wider than it."""
    seen = []

    def spy(module, query, key, value, mask, **settings):
        seen.append((query.shape[2], None if mask is None else mask.shape[-1]))
        return sdpa_attention.sdpa_attention_forward(module, query, key, value, mask, **settings)

    target = make_target(make_model, "qwen3", "sdpa", changes)
    target.generate_batch(
        *[torch.ones(1, 16, dtype=torch.int64)] * 3, segment_ids=torch.tensor([[0] * 8 + [1] * 8])
    )
    monkeypatch.setattr(chat_attention, "sdpa_attention_forward", spy)
    tokens = collate(chats(), LENGTH, packed=True)
    target.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask, tokens.segment_ids)
    padding = [LENGTH - sum(row) for row in ROWS]
    per_layer = [length for row, rest in zip(ROWS, padding, strict=True) for length in (*row, rest) if length]
    assert [length for length, _ in seen] == per_layer * 7
    masked = {(length, width) for length, width in seen if width is not None}
    assert masked == ({(length, length) for length in per_layer if length > 4} if changes else set())


def test_a_packed_forward_leaves_the_models_own_attention_behind(make_model, monkeypatch):
    target = make_target(make_model, "llama", "sdpa", {})
    tokens = collate(chats(), LENGTH, packed=True)
    plain = torch.ones_like(tokens.input_ids)
    before = target.generate_batch(tokens.input_ids, plain, plain).last_hidden_state
    target.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask, tokens.segment_ids)
    assert target.model.config._attn_implementation == "sdpa"
    assert torch.equal(target.generate_batch(tokens.input_ids, plain, plain).last_hidden_state, before)
    monkeypatch.setattr(target.model.model.layers[2], "forward", lambda *args, **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        target.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask, tokens.segment_ids)
    assert target.model.config._attn_implementation == "sdpa"
