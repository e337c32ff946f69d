import pytest
import torch

from eagle_rpc.draft import Chains, TargetText
from eagle_rpc.evaluate.slices import Draft, by_category, by_context, drafts_of, slice_of

EASY, HARD = [Draft(100, 3), Draft(104, 3)], [Draft(300, 0), Draft(301, 1), Draft(700, 0)]


def test_drafts_begin_where_decoding_begins_them():
    text = TargetText(prompt_ids=range(100), token_ids=range(6))
    chains = Chains(num_right=[2, 9, 9, 0, 1], margins_AS=torch.empty(5, 2))
    assert drafts_of(text, chains, 2) == [Draft(101, 2), Draft(104, 0), Draft(105, 1)]
    assert [draft.context for draft in drafts_of(text, chains, 1)] == [101, 103, 105]


def test_categories_add_up_to_all_drafts():
    slices = by_category([EASY, HARD, EASY], ["writing", "math", "writing"])
    assert list(slices) == ["math", "writing"]
    assert (slices["writing"].accept_length, slices["writing"].num_prompts) == (4.0, 2)
    assert slices["math"].accept_length == pytest.approx(4 / 3)
    assert slices["math"].accept_length_interval is None
    whole = slice_of([EASY, HARD, EASY])
    assert whole.num_drafts == sum(one.num_drafts for one in slices.values()) == 7
    assert whole.accept_length == pytest.approx(20 / 7)


def test_a_range_of_contexts_ends_at_a_power_of_two():
    slices = by_context([EASY, HARD, [Draft(512, 1), Draft(513, 2)]])
    assert {longest: one.num_drafts for longest, one in slices.items()} == {128: 2, 512: 3, 1024: 2}
    assert {longest: one.num_prompts for longest, one in slices.items()} == {128: 1, 512: 2, 1024: 2}
    assert slices[1024].accept_length == pytest.approx(2.0)


def test_a_text_without_drafts_has_no_slice():
    assert by_context([[]]) == {}
    assert slice_of([[]]).num_drafts == 0
