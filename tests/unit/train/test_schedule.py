import math

import pytest
from training_cases import train_config

from eagle_rpc.config.choices import Schedule
from eagle_rpc.train.schedule import peak_rate, share_of_peak


def shares(steps: int, **changes) -> list[float]:
    settings = {"warmup_share": 0.25, "min_learning_rate_share": 0.5, **changes}
    return [share_of_peak(step, steps, train_config(**settings)) for step in range(steps)]


def test_the_rate_climbs_then_falls_along_a_cosine():
    rates = shares(8)
    assert rates[:2] == [0.5, 1.0]
    assert rates[4] == pytest.approx(0.75)  # half of the way from 1 to 0.5
    assert rates[2] == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 6)))
    assert rates[7] == pytest.approx(0.5)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_the_rate_falls_along_a_line():
    assert shares(6, schedule=Schedule.linear, warmup_share=1 / 3) == pytest.approx(
        [0.5, 1.0, 0.875, 0.75, 0.625, 0.5]
    )


def test_the_rate_stays_constant():
    assert shares(8, schedule=Schedule.constant) == [0.5] + 7 * [1.0]


def test_the_rate_stays_and_falls_at_the_end():
    rates = shares(20, schedule=Schedule.wsd, warmup_share=0.1, decay_share=0.2)
    assert rates == pytest.approx([0.5] + 15 * [1.0] + [0.875, 0.75, 0.625, 0.5])


def test_a_longer_run_has_the_same_rates_while_they_are_constant():
    short, long = (
        shares(steps, schedule=Schedule.wsd, warmup_share=0.0, decay_share=0.25) for steps in (8, 16)
    )
    assert short[:6] == long[:6] == 6 * [1.0]


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_rate_without_warm_up_and_with_nothing_else(schedule, share):
    rates = shares(4, schedule=schedule, warmup_share=share, decay_share=0.0)
    assert all(0 < rate <= 1 for rate in rates)


def test_wide_drafts_get_a_lower_rate_unless_one_is_named():
    assert peak_rate(train_config(learning_rate=None), 576) == 1e-3
    assert peak_rate(train_config(learning_rate=None), 64) == 1e-3
    assert peak_rate(train_config(learning_rate=None), 4096) == pytest.approx(1.40625e-4)
    assert peak_rate(train_config(learning_rate=2e-4), 4096) == 2e-4
