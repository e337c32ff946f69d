"""Training-time test of live slots against that of every slot, in float64."""

from dataclasses import replace

import pytest
import torch
from support.full_unroll import full_ttt_loss
from support.ttt_cases import Case, case_batch, case_draft, gradients, random_case

from eagle_rpc.draft import Objective, ReferenceStep, count_rows
from eagle_rpc.draft.fused import FusedStep, slot_plan
from eagle_rpc.draft.live_slots import LiveSlots
from eagle_rpc.supervision import Eagle3TargetBatch, StoredProbs, TokenBatch

FORMS = {
    "_ALL_LIVE_SHARE": (0.95, 0.3),
    "_SPEED_OF_WHOLE_SEQUENCES": (1.0, 1.6, 4.0),
    "_KEYS_OF_A_SLOT": (1, 3, 7, 100, 100),
}
FIGURES = ("loss", "loss_sums", "rows", "correct", "accepted", "drafts")


def tokens_of(loss_mask: list[list[int]], segment_ids: list[list[int]] | None = None) -> TokenBatch:
    mask = torch.tensor(loss_mask)
    segments = None if segment_ids is None else torch.tensor(segment_ids)
    return TokenBatch(
        input_ids=mask, attention_mask=torch.ones_like(mask), loss_mask=mask, segment_ids=segments
    )


@pytest.mark.parametrize("seed", range(240))
def test_live_slots_alone_give_the_loss_and_gradients_of_all_slots(seed, monkeypatch):
    # Every form of attention, and short gaps even in these short chats.
    for name, values in FORMS.items():
        monkeypatch.setattr(slot_plan, name, values[seed % len(values)])
    case, objective = random_case(seed)
    draft, batch = case_draft(case).double(), with_float64_targets(case_batch(case))
    denominators = count_rows(batch, objective.steps)
    expected = full_ttt_loss(draft, batch, objective, denominators)
    expected.loss.backward()
    expected_grads = gradients(draft)
    ways = [ReferenceStep(draft, objective, autocast=None)]
    if case.num_layers == 1:
        ways.append(FusedStep(draft, objective, dtype=torch.float64, recompute_mlp=seed % 2 == 0))
    for step in ways:
        draft.zero_grad(set_to_none=True)
        result = step.add_gradients(batch, denominators)
        assert_equal(result, gradients(draft), expected, expected_grads)


def assert_equal(result, grads, expected, expected_grads) -> None:
    for name in FIGURES:
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-12, atol=1e-12, msg=name
        )
    assert grads.keys() <= expected_grads.keys()
    for name, grad in expected_grads.items():
        actual = grads.get(name, torch.zeros_like(grad))
        torch.testing.assert_close(
            actual, grad, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def with_float64_targets(batch: Eagle3TargetBatch) -> Eagle3TargetBatch:
    """Targets whose logits and probabilities are one distribution in float64."""
    probs_NK = batch.targets.logits(slice(None)).double().softmax(dim=-1)
    return replace(batch, targets=StoredProbs(probs_NK), log_normalizer=torch.full((len(probs_NK),), 0.3))


def test_a_slot_is_live_if_one_of_its_rows_may_be_supervised():
    # Tokens 4 and 9 are supervised, so rows 3 and 8; three steps from slot t read rows t to t + 2.
    live = LiveSlots.of(tokens_of([[0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]]), 3)
    assert live.places.tolist() == [1, 2, 3, 6, 7, 8]
    assert (live.chat_lengths, live.live_lengths) == ([11], [6])


def test_no_slot_is_live_for_a_row_of_another_chat_or_sequence():
    loss_mask = [[1, 1, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0]]
    segments = [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 3]]
    live = LiveSlots.of(tokens_of(loss_mask, segments), 4)
    assert live.places.tolist() == [0, 4, 7]
    assert (live.chat_lengths, live.live_lengths) == ([2, 2, 2, 1, 4, 1], [1, 0, 1, 0, 1, 0])
    unpacked = LiveSlots.of(tokens_of(loss_mask), 4)
    assert unpacked.places.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert (unpacked.chat_lengths, unpacked.live_lengths) == ([6, 6], [5, 2])


def test_one_slot_is_live_even_without_rows():
    assert LiveSlots.of(tokens_of([[0, 0, 0], [0, 0, 0]]), 2).places.tolist() == [0]


def test_the_feed_forward_block_sees_live_slots_only():
    case = Case(blocks=1, length=26, seed=3)
    draft, batch = case_draft(case), case_batch(case)
    sizes = []
    draft.midlayer.mlp.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))
    ReferenceStep(draft, Objective(steps=3, step_decay=0.8), autocast=None).judge(batch, count_rows(batch, 3))
    live = len(LiveSlots.of(batch.tokens, 3).places)
    assert sizes == [live] * 3 and live < batch.input_ids.numel()
