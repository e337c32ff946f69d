"""Each rule at its threshold: advice on one side, none on the other."""

import pytest

from eagle_rpc.report import advice
from eagle_rpc.report.advice import advice_of

TARGETS = [{"name": "target0", "busy_share": 0.9}]
IDLE = [{"name": "target0", "busy_share": 0.2}]


def test_waiting_trainers_ask_for_a_target():
    assert list(advice.on_waiting(0.31, TARGETS, 1, {})) == [
        "trainers waited 31% of the time for supervision: add a target (topology.targets=2)"
    ]
    assert list(advice.on_waiting(advice.LONG_WAIT, [], 0, {}))
    assert not list(advice.on_waiting(advice.LONG_WAIT - 0.001, TARGETS, 1, {}))
    assert not list(advice.on_waiting(None, TARGETS, 1, {}))


def test_trainers_that_wait_for_transfer_do_not_ask_for_a_target():
    waits = {"queue": 0.0, "compute": 0.15, "transfer": 0.16}
    (said,) = advice.on_waiting(0.31, TARGETS, 1, waits)
    assert "(15% for its computing, 16% for its transfer)" in said and "supervision.encoding" in said
    (said,) = advice.on_waiting(0.31, TARGETS, 1, {"compute": 0.155, "transfer": 0.155})
    assert "add a target" in said


def test_idle_targets_ask_for_a_trainer_only_if_trainers_do_not_wait():
    assert "topology.trainers=3" in next(advice.on_waiting(0.0, IDLE, 2, {}))
    assert not list(advice.on_waiting(advice.SHORT_WAIT + 0.001, IDLE, 2, {}))
    assert not list(advice.on_waiting(0.0, TARGETS, 2, {}))
    assert not list(advice.on_waiting(0.0, [{"busy_share": advice.IDLE_TARGET}], 2, {}))


def test_a_service_is_told_how_many_targets_would_end_the_waiting():
    busy, waiting = [{"busy_share": 0.98}] * 4, [{"wait_share": 0.5}] * 8
    (line,) = advice.on_service(busy, waiting)
    assert "trainers wait 50%" in line and "targets compute 98%" in line and "8 targets instead of 4" in line
    assert not list(advice.on_service(busy, [{"wait_share": advice.LONG_WAIT - 0.001}]))
    assert not list(advice.on_service(busy, [{}])) and not list(
        advice.on_service([{"busy_share": "x"}], waiting)
    )


def test_a_service_whose_idle_targets_are_waited_for_needs_no_more_of_them():
    (line,) = advice.on_service([{"busy_share": 0.3}] * 4, [{"wait_share": 0.4}])
    assert "more targets would not help; raise supervision.prefetch" in line


def test_a_service_is_told_how_many_targets_are_enough_and_how_many_trainers_fit():
    (line,) = advice.on_service([{"busy_share": 0.2}] * 4, [{"wait_share": 0.0}] * 2)
    assert "1 of 4 targets are enough, or about 8 trainers fit instead of 2" in line
    assert not list(advice.on_service([{"busy_share": advice.IDLE_TARGET}], [{"wait_share": 0.0}]))


def test_the_first_half_of_the_lines_does_not_count_as_waiting():
    lines = [{"step": 1, "wait_share": 0.9}, {"step": 2, "wait_share": 0.9}]
    late = [
        {"step": 3, "wait_share": 0.0},
        {"step": 4, "validation/loss": 1.0},
        {"step": 5, "wait_share": 0.1},
    ]
    assert advice.mean_wait([*lines, *late]) == pytest.approx(0.05)
    assert advice.mean_wait([]) is None


def test_a_rising_accept_length_asks_for_more_training():
    rising = [(100, 1.5), (200, 1.7), (300, 1.7 + advice.RISING)]
    assert "accept length still rises" in next(advice.on_validations(rising))
    assert not list(advice.on_validations([(100, 1.5), (200, 1.7), (300, 1.7 + 0.9 * advice.RISING)]))
    assert not list(advice.on_validations(rising[:2]))  # too few to tell


def test_validations_that_are_no_better_than_an_earlier_one_are_told():
    falling = [(100, 1.5), (200, 1.8), (300, 1.7), (400, 1.7), (500, 1.7)]
    assert "the 3 validations after step 200" in next(advice.on_validations(falling))
    assert not list(advice.on_validations(falling[:-1]))


def test_a_rising_validation_loss_asks_for_data():
    assert "since step 2" in next(advice.on_overfitting([(1, 3.0), (2, 2.0), (3, 2.0 * 1.021)]))
    assert not list(advice.on_overfitting([(1, 3.0), (2, 2.0), (3, 2.0 * advice.OVERFITTED)]))
    assert not list(advice.on_overfitting([]))


def test_tokens_outside_the_draft_vocabulary_name_the_next_size_and_what_it_leaves():
    coverage = [(8192, 0.88), (16384, 0.96), (32768, 1.0)]
    assert list(advice.on_vocabulary(coverage, 8192)) == [
        "12 % of the predicted tokens are outside the draft vocabulary: draft.vocab_size=16384 would leave 4 %"
    ]
    assert not list(advice.on_vocabulary(coverage, 16384))
    assert not list(advice.on_vocabulary(coverage, 8192, covered=1 - advice.MANY_UNCOVERED + 0.001))
    assert not list(advice.on_vocabulary([(8192, 0.5)], 8192))  # the whole vocabulary has no larger one


def test_checks_of_real_decoding_speak_only_if_they_failed():
    assert len(list(advice.on_checks(False, False))) == 2
    assert not list(advice.on_checks(True, True)) and not list(advice.on_checks(None, None))


def test_a_wide_interval_asks_for_as_many_prompts_as_would_narrow_it():
    # 0.2 of 2.0 is twice the threshold: four times the prompts.
    assert "evaluate.num_prompts=64" in next(advice.on_interval(2.0, (1.8, 2.2), 16))
    assert not list(advice.on_interval(2.0, (1.901, 2.099), 16))
    assert "no interval" in next(advice.on_interval(2.0, None, 1))


def test_a_category_is_named_only_if_it_is_clearly_weaker():
    def slices(weak, high):
        return {
            "code": {"accept_length": weak, "accept_length_interval": (weak - 0.1, high)},
            "facts": {"accept_length": 2.2, "accept_length_interval": (2.1, 2.3)},
        }

    assert "prompts of code accept 1.50" in next(advice.on_categories((1.9, 2.1), slices(1.5, 1.6)))
    assert not list(advice.on_categories((1.9, 2.1), slices(1.5, 2.0)))  # intervals overlap
    assert not list(advice.on_categories((1.999, 2.001), slices(1.95, 1.96)))  # the distance is small
    assert not list(advice.on_categories(None, slices(1.5, 1.6)))


def test_last_guesses_that_hold_ask_for_longer_drafts():
    assert "num_draft_tokens=5" in next(advice.on_draft_tokens([0.8, 0.7, advice.STILL_ACCEPTED]))
    assert not list(advice.on_draft_tokens([0.8, 0.7, advice.STILL_ACCEPTED - 0.01]))


def test_a_draft_that_slows_decoding_is_told():
    assert "18.9 against 23.5" in next(advice.on_speed(18.9, 23.5))
    assert not list(advice.on_speed(23.5, 23.5)) and not list(advice.on_speed(None, None))


def test_a_run_without_files_gets_no_advice_and_a_full_one_that_of_all_rules():
    assert advice_of([], None, None) == []
    metrics = [
        {"step": step, "wait_share": 0.5, "validation/accept_length": 1 + step / 10} for step in (1, 2, 3)
    ]
    training = {
        "targets": [],
        "trainers": [],
        "coverage": [(8, 0.5), (16, 1.0)],
        "draft_vocab_size": 8,
        "covered": 0.5,
    }
    evaluation = {
        "identical_texts": True,
        "counts_agree": False,
        "accept_length": 2.0,
        "accept_length_interval": None,
        "num_prompts": 1,
        "by_category": {},
        "conditional_acceptance_per_position": [0.9],
        "tokens_per_second": 1.0,
        "tokens_per_second_without_draft": 2.0,
    }
    found = advice_of(metrics, training, evaluation)
    for words in ("waited 50%", "still rises", "outside", "accepts other", "no interval", "longer", "slower"):
        assert any(words in line for line in found), words
