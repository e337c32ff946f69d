import pytest

from eagle_rpc.evaluate.intervals import bootstrap_interval


def test_equal_prompts_leave_no_doubt():
    assert bootstrap_interval([3, 6, 9], [2, 4, 6]) == pytest.approx((1.5, 1.5))


def test_the_interval_holds_the_value_and_narrows_with_more_prompts():
    widths = []
    for repeats in (1, 16):
        low, high = bootstrap_interval([10, 14, 30, 12] * repeats, [10, 10, 20, 10] * repeats)
        assert low < 66 / 50 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_the_same_prompts_give_the_same_interval():
    assert bootstrap_interval([10, 14], [10, 10]) == bootstrap_interval([10, 14], [10, 10])


def test_prompts_without_drafts_do_not_count_and_one_prompt_has_no_interval():
    assert bootstrap_interval([5, 0], [4, 0]) is None
    assert bootstrap_interval([10, 14, 0], [10, 10, 0]) == bootstrap_interval([10, 14], [10, 10])
