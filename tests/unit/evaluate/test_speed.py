import pytest
from evaluation_cases import tiny_export, tiny_model

from eagle_rpc.evaluate.speed import CallTimes, estimate_speed
from eagle_rpc.evaluate.timing import time_calls

TIMES = CallTimes(
    batch_size=4,
    context=100,
    target={1: 0.010, 2: 0.011, 3: 0.012, 4: 0.020},
    draft_read={2: 0.001, 3: 0.001, 4: 0.002},
    draft_guess=0.001,
)


def test_a_case_worked_by_hand():
    speed = estimate_speed(TIMES, {1: 1.5, 2: 1.8, 3: 2.0})
    assert speed.tokens_per_second_without_draft == pytest.approx(400)
    # 4 x 1.5 tokens in 11 + 1 ms, 4 x 1.8 in 12 + 1 + 1 ms, 4 x 2 in 20 + 2 + 2 ms.
    assert speed.tokens_per_second == pytest.approx({1: 500, 2: 7.2 / 0.014, 3: 8 / 0.024})
    assert speed.speed_up == pytest.approx({1: 1.25, 2: 7.2 / 5.6, 3: 8 / 9.6})
    assert speed.best_draft_tokens == 2


def test_no_draft_is_best_where_each_is_slower():
    assert estimate_speed(TIMES, {1: 1.1, 2: 1.2, 3: 1.3}).best_draft_tokens == 0


def test_a_free_draft_and_a_flat_target_give_the_accept_length():
    times = CallTimes(
        batch_size=1,
        context=1,
        target=dict.fromkeys(range(1, 4), 0.5),
        draft_read={2: 0.0, 3: 0.0},
        draft_guess=0.0,
    )
    assert estimate_speed(times, {1: 1.4, 2: 1.6}).speed_up == pytest.approx({1: 1.4, 2: 1.6})


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_call_of_a_round_is_timed(batch_size, tmp_path):
    model = tiny_model()
    draft = tiny_export(model, tmp_path / "export").model()
    times = time_calls(model, draft, batch_size=batch_size, context=20, num_draft_tokens=3)
    assert (times.batch_size, times.context) == (batch_size, 20)
    assert list(times.target) == [1, 2, 3, 4] and list(times.draft_read) == [2, 3, 4]
    assert min(*times.target.values(), *times.draft_read.values(), times.draft_guess) > 0
