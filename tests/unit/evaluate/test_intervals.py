import pytest

from eagle_rpc.evaluate.intervals import bootstrap_gain, bootstrap_interval


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


def test_the_gain_over_equal_prompts_is_sharper_than_the_two_intervals():
    hard_and_easy = ([12, 30, 14, 28] * 4, [10] * 16)
    a_little_more = ([tokens + 1 for tokens in hard_and_easy[0]], [10] * 16)
    low, high = bootstrap_gain(hard_and_easy, a_little_more)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    one, other = bootstrap_interval(*hard_and_easy), bootstrap_interval(*a_little_more)
    assert one[1] > other[0]  # these overlap


def test_a_single_prompt_gives_no_interval_of_a_gain():
    assert bootstrap_gain(([5], [4]), ([6], [4])) is None
