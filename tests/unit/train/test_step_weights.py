"""The weights of the steps of training-time test: given, or learned from the draft's own acceptance."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from training_cases import (
    OBJECTIVE,
    RandomPlan,
    TableTarget,
    assert_same_bits,
    final_state,
    make_trainer,
    random_draft,
    run_record,
    train_config,
    trained_with_a_break,
)

from eagle_rpc.config.choices import StepWeighting
from eagle_rpc.config.schema import Config, DraftConfig
from eagle_rpc.draft import step_weights
from eagle_rpc.errors import CheckpointError
from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.checkpoint import latest_checkpoint, read_checkpoint
from eagle_rpc.train.learner import Learner
from eagle_rpc.train.record import plain

LEARNED = replace(OBJECTIVE, step_weighting=StepWeighting.learned)


def listed(*weights: float) -> DraftConfig:
    return replace(OBJECTIVE, step_weighting=StepWeighting.listed, step_weights=list(weights))


def learner_of(objective: DraftConfig) -> Learner:
    config = train_config(autocast=None)
    return Learner(random_draft(), config, objective, TrainerGroup(), total_steps=40)


def learned_steps(learner: Learner, count: int = 3) -> list[float]:
    target = TableTarget()
    return [
        float(learner.learn([target.supervise(RandomPlan().batch(number))]).grad_norm)
        for number in range(count)
    ]


def test_a_list_of_powers_trains_as_the_decay_does():
    by_decay, by_list = learner_of(OBJECTIVE), learner_of(listed(*step_weights(3, 0.8).tolist()))
    torch.testing.assert_close(by_list.step_weights, by_decay.step_weights)
    assert learned_steps(by_list) == pytest.approx(learned_steps(by_decay), rel=1e-5)


def test_a_step_of_weight_zero_gives_no_gradient():
    learner = learner_of(listed(1, 0, 0))
    alone = learner_of(replace(OBJECTIVE, ttt_steps=1))
    batch = TableTarget().supervise(RandomPlan().batch(0))
    for one in (learner, alone):
        one.learn([batch])
    for (name, weight), (_, expected) in zip(learner.weights(), alone.weights(), strict=True):
        torch.testing.assert_close(weight, expected, msg=name)


def test_learned_weights_follow_the_share_of_drafts_that_reach_a_step():
    learner, target = learner_of(LEARNED), TableTarget()
    reached = torch.tensor([1, 0.8, 0.64], dtype=torch.float64)
    torch.testing.assert_close(learner.step_weights, (reached / reached.sum()).float())
    for number in range(4):
        outcome = learner.learn([target.supervise(RandomPlan().batch(number))])
        sums = outcome.sums.on_host()
        reached[1:] = 0.99 * reached[1:] + 0.01 * (sums["accepted"] / sums["drafts"])[:-1]
        torch.testing.assert_close(learner.step_weights, (reached / reached.sum()).float())


def test_the_first_step_is_weighted_as_without_learning_and_later_ones_otherwise():
    by_decay, learned = learned_steps(learner_of(OBJECTIVE)), learned_steps(learner_of(LEARNED))
    assert learned[0] == pytest.approx(by_decay[0], rel=1e-6)
    assert learned[2] != by_decay[2]


def trainer_of(path, **parts):
    settings = train_config(max_steps=5, accumulation=2, checkpoint_every=2, validate_every=3)
    record = run_record(settings, config=plain(Config(train=settings, draft=LEARNED)))
    return make_trainer(path, settings, objective=LEARNED, record=record, **parts)


def test_learned_weights_resume_bit_for_bit(tmp_path):
    straight = trainer_of(tmp_path / "straight")
    straight.train()
    resumed = trained_with_a_break(partial(trainer_of, tmp_path / "resumed"), at=8)
    assert_same_bits(final_state(resumed), final_state(straight))
    reached = [one.learner.snapshot().reached_steps for one in (resumed, straight)]
    assert reached[0] == reached[1]
    assert torch.equal(resumed.learner.step_weights, straight.learner.step_weights)
    lines = [line for line in read_metrics(tmp_path / "resumed" / "metrics.jsonl") if "step_weights" in line]
    assert lines[-1]["step_weights"] == straight.learner.step_weights.tolist()


def test_the_state_of_another_number_of_steps_is_refused(tmp_path):
    trainer_of(tmp_path).train()
    state = read_checkpoint(latest_checkpoint(tmp_path / "checkpoints")).state
    assert len(state.reached_steps) == 3
    with pytest.raises(CheckpointError, match="reached_steps must hold 0 numbers, got 3"):
        learner_of(OBJECTIVE).load(state, 5)
