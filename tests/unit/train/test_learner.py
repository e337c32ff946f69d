import logging

import pytest
import torch
from training_cases import OBJECTIVE, RandomPlan, TableTarget, random_draft, train_config

from eagle_rpc.config.choices import DraftLoss, Precision
from eagle_rpc.config.schema import DraftConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.figures import in_one_line
from eagle_rpc.train.learner import Learner


def learner_of(objective: DraftConfig = OBJECTIVE, **changes) -> Learner:
    return Learner(random_draft(), train_config(**changes), objective, TrainerGroup(), total_steps=40)


def mean_loss(sums) -> float:
    return float((sums["loss_sums"] / sums["rows"]).mean())


@pytest.mark.parametrize("loss", list(DraftLoss), ids=lambda loss: loss.value)
def test_every_loss_is_lowered_by_training(loss):
    objective = DraftConfig(vocab_size=OBJECTIVE.vocab_size, ttt_steps=OBJECTIVE.ttt_steps, loss=loss)
    learner, batch = learner_of(objective), TableTarget().supervise(RandomPlan(batch_size=4).batch(0))
    losses = [mean_loss(learner.learn([batch]).sums.on_host()) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]


def test_recomputation_without_the_fused_step_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        learner_of(recompute_mlp=True)
    assert "train.recompute_mlp has no effect" in caplog.text


def test_fp8_without_a_gpu_that_multiplies_it_is_refused():
    with pytest.raises(ConfigError, match=r"train.precision=fp8 must have a GPU .*8.9 or later, got cpu"):
        learner_of(precision=Precision.fp8)


def test_a_judgement_changes_neither_weights_nor_gradients():
    learner, batch = learner_of(), TableTarget().supervise(RandomPlan().batch(0))
    learner.learn([batch])
    before = learner.digest()
    gradients = [parameter.grad.clone() for parameter in learner.parameters.values()]
    learner.judge(batch, learner.empty_sums())
    assert learner.digest() == before
    for parameter, gradient in zip(learner.parameters.values(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_progress_line_has_loss_accuracy_accept_length_and_pace():
    figures = {
        "loss": 2.3456,
        "accuracy": [0.25, 0.1],
        "simulated_accept_length": 1.5,
        "tokens_per_second": 812.4,
        "wait_share": 0.125,
    }
    line = "loss 2.346, accuracy 0.250, simulated accept length 1.50, 812 tok/s, waiting 12%"
    assert in_one_line(figures) == line
