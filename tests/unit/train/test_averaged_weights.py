"""The moving average of the weights: its values, who takes it, and that it survives a break."""

import torch
from training_cases import OBJECTIVE, RandomPlan, TableTarget, make_trainer, random_draft, train_config

from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.checkpoint import latest_checkpoint, read_checkpoint
from eagle_rpc.train.learner import Learner

SETTINGS = train_config(max_steps=6, validate_every=3, ema_decay=0.5, autocast=None)


def learner_of(**changes) -> Learner:
    return Learner(random_draft(), train_config(**changes), OBJECTIVE, TrainerGroup(), total_steps=40)


def copies(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


def test_the_average_begins_with_the_weights_and_follows_them():
    learner, target = learner_of(ema_decay=0.75), TableTarget()
    expected = copies(learner.weights())
    for number in range(3):
        learner.learn([target.supervise(RandomPlan().batch(number))])
        for name, tensor in learner.weights():
            expected[name] = 0.75 * expected[name] + 0.25 * tensor.detach()
    for name, average in learner.average():
        torch.testing.assert_close(average, expected[name], rtol=1e-6, atol=1e-7)


def test_an_average_changes_no_step():
    learners, target = [learner_of(ema_decay=decay) for decay in (None, 0.9)], TableTarget()
    for learner in learners:
        for number in range(3):
            learner.learn([target.supervise(RandomPlan().batch(number))])
            with learner.averaged():
                learner.judge(target.supervise(RandomPlan().batch(9)), learner.empty_sums())
    plain, averaged = (copies(learner.weights()) for learner in learners)
    assert all(torch.equal(plain[name], averaged[name]) for name in plain)
    assert dict(learners[0].average()) == {} and learners[0].draft_weights().keys() == plain.keys()


def test_the_weights_come_back_after_an_error():
    learner = learner_of(ema_decay=0.9)
    learner.learn([TableTarget().supervise(RandomPlan().batch(0))])
    before = learner.digest()
    try:
        with learner.averaged():
            assert learner.digest() != before
            raise ConnectionError
    except ConnectionError:
        pass
    assert learner.digest() == before


def test_validation_and_export_take_the_average(tmp_path):
    make_trainer(tmp_path / "averaged", SETTINGS).train()
    checkpoint = read_checkpoint(latest_checkpoint(tmp_path / "averaged" / "checkpoints"))
    average = checkpoint.state.average
    assert checkpoint.draft_weights is average and average.keys() == checkpoint.state.weights.keys()
    assert not torch.equal(average["fc.weight"], checkpoint.state.weights["fc.weight"])
    # A run that only validates, with the average as its weights.
    draft = random_draft()
    draft.load_state_dict(average, strict=False)
    judge = make_trainer(tmp_path / "judge", train_config(autocast=None), draft=draft)
    figures = judge._validation.figures()
    line = [
        line for line in read_metrics(tmp_path / "averaged" / "metrics.jsonl") if "validation/loss" in line
    ][-1]
    assert line["step"] == 6
    assert line["validation/loss"] == figures["loss"]
    assert line["validation/accept_length"] == figures["accept_length"]
