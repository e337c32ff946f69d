"""Plans of the fused unroll for written-down masks."""

import torch

from eagle_rpc.draft.fused import slot_plan
from eagle_rpc.draft.fused.slot_plan import SlotPlan
from eagle_rpc.supervision import TokenBatch

CPU = torch.device("cpu")


def plan_of(rows: list[list[int]], steps: int = 1, segment_ids: list[list[int]] | None = None) -> SlotPlan:
    """For a batch in which these rows may be supervised."""
    loss_mask = torch.tensor(rows).roll(1, dims=1)
    segments = None if segment_ids is None else torch.tensor(segment_ids)
    tokens = TokenBatch(
        input_ids=loss_mask,
        attention_mask=torch.ones_like(loss_mask),
        loss_mask=loss_mask,
        segment_ids=segments,
    )
    return SlotPlan.of(tokens, steps, CPU)


def test_a_run_of_live_slots_gets_the_keys_of_its_chat_up_to_its_end():
    plan = plan_of([[0, 0, 0, 1, 1, 0, 0, 0, 1, 0]])
    assert plan.live.tolist() == [3, 4, 8]
    assert plan.idle.tolist() == [0, 1, 2, 5, 6, 7]
    assert plan.blocks.queries.tolist() == [0, 2, 3]
    assert plan.blocks.keys.tolist() == [0, 5, 14]
    assert plan.blocks.longest == (2, 9)
    assert plan.blocks.pairs == 4 + 5 + 9
    assert torch.cat((plan.live, plan.idle))[plan.key_sources].tolist() == [*range(5), *range(9)]


def test_no_run_and_no_key_crosses_the_border_of_a_chat():
    plan = plan_of(
        [[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]], segment_ids=[[0, 0, 0, 1, 1, 1], [0, 0, 2, 2, 2, 2]]
    )
    assert plan.live.tolist() == [1, 3, 4, 10]
    assert plan.blocks.queries.tolist() == [0, 1, 3, 4]
    assert torch.cat((plan.live, plan.idle))[plan.key_sources].tolist() == [0, 1, 3, 4, 8, 9, 10]


def test_the_slots_of_a_short_gap_are_unrolled(monkeypatch):
    monkeypatch.setattr(slot_plan, "_KEYS_OF_A_SLOT", 2)
    # Before slot 4 are a gap of two slots and four keys, before slot 11 a gap of six and eleven keys.
    plan = plan_of([[0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]])
    assert plan.live.tolist() == [1, 2, 3, 4, 11]


def test_whole_sequences_are_attended_to_where_runs_are_no_less_work():
    plan = plan_of([[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 0]])
    assert plan.blocks is None and not plan.all_live
    assert plan.live.tolist() == [2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 14]
    assert torch.cat((plan.live, plan.idle))[plan.key_sources].tolist() == list(range(16))


def test_few_slots_that_are_not_live_are_unrolled_as_well():
    plan = plan_of([[1] * 39 + [0]])
    assert plan.all_live and plan.live.tolist() == list(range(40)) and len(plan.idle) == 0


def test_live_slots_embed_the_tokens_of_all_their_steps():
    plan = plan_of([[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], steps=3)
    assert plan.live.tolist() == [4, 5, 6, 12, 13]
    # Rows of ids have 12 + 2 entries.
    assert plan.embedded.tolist() == [4, 5, 6, 7, 8, 14, 15, 16, 17]
    assert plan.first_embedded.tolist() == [0, 1, 2, 5, 6]
