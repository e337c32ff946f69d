"""The best checkpoint by validation: it is written, kept, named by a link, and training may end by it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from training_cases import TableTarget, assert_same_bits, final_state, make_trainer, train_config

from eagle_rpc.errors import CheckpointError, ConfigError, TargetUnavailable
from eagle_rpc.jobs.export import _chosen
from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.train.checkpoint import best_checkpoint, latest_checkpoint, read_checkpoint
from eagle_rpc.train.history import ValidationHistory
from eagle_rpc.train.validation import Validation

SETTINGS = train_config(max_steps=20, validate_every=2, checkpoint_every=5, keep_checkpoints=1)


@pytest.fixture
def scripted(monkeypatch):
    """Makes validations find these accept lengths, in their order of steps 2, 4, 6, ..."""

    def script(*lengths: float) -> None:
        real = Validation.figures

        def figures(validation: Validation):
            number = validation._learner.steps_done // 2 - 1
            return {**real(validation), "accept_length": lengths[min(number, len(lengths) - 1)]}

        monkeypatch.setattr(Validation, "figures", figures)

    return script


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def test_the_history_keeps_the_first_of_equally_good_validations():
    history = ValidationHistory()
    for step, length in enumerate([1.2, 1.5, 1.5, 1.4], start=1):
        history = history.with_result(step, length)
    assert (history.best_step, history.best_accept_length, history.last_step) == (2, 1.5, 4)
    assert history.since_best == 2
    assert history.exhaustion(None) is None and history.exhaustion(3) is None
    assert "1.500 of step 2" in str(history.exhaustion(2))
    assert ValidationHistory(**history.to_json()) == history


def test_the_best_checkpoint_outlives_newer_ones_and_has_a_link(tmp_path, scripted):
    scripted(1.1, 1.3, 1.2)
    make_trainer(tmp_path, SETTINGS).train()
    checkpoints = tmp_path / "checkpoints"
    assert steps_kept(tmp_path) == [4, 20]
    assert os.readlink(checkpoints / "best") == "step_4"
    assert os.readlink(checkpoints / "latest") == "step_20"
    assert best_checkpoint(checkpoints) == checkpoints / "step_4"
    assert latest_checkpoint(checkpoints) == checkpoints / "step_20"
    assert read_checkpoint(checkpoints / "best").step == 4


def test_training_ends_when_validations_stop_improving_and_stays_ended(tmp_path, scripted, caplog):
    caplog.set_level("INFO")
    scripted(1.1, 1.3, 1.2, 1.3, 1.25, 1.0)
    patient = replace(SETTINGS, patience=3)
    make_trainer(tmp_path, patient).train()
    assert steps_kept(tmp_path) == [4, 10]
    assert "training ends after step 10: train.patience=3 validations without a higher" in caplog.text
    target = TableTarget()
    again = make_trainer(tmp_path, patient, target=target)
    again.train()
    assert again.learner.steps_done == 10 and target.batches_delivered == 0


def test_a_run_that_ended_early_goes_on_with_more_patience_as_if_it_had_not_ended(tmp_path, scripted):
    scripted(1.1, 1.3, 1.2)
    make_trainer(tmp_path / "early", replace(SETTINGS, patience=2)).train()
    trainers = [make_trainer(tmp_path / name, SETTINGS) for name in ("early", "straight")]
    for trainer in trainers:
        trainer.train()
    assert_same_bits(*map(final_state, trainers))
    lines = [
        [line.get("loss") for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("early", "straight")
    ]
    assert lines[0] == lines[1]


def test_a_resumed_run_remembers_the_best(tmp_path, scripted):
    scripted(1.1, 1.3, 1.2)
    make_trainer(tmp_path, replace(SETTINGS, max_steps=9)).train()
    (tmp_path / "checkpoints" / "best").unlink()
    make_trainer(tmp_path, SETTINGS).train()
    assert steps_kept(tmp_path) == [4, 20]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step_4"


class LostTarget(TableTarget):
    """Is gone in the validation of step 4."""

    def deliver(self, tokens):
        if self.batches_delivered == 20:
            raise TargetUnavailable("no target")
        return super().deliver(tokens)


def test_a_validation_that_lost_its_target_is_made_up_for(tmp_path):
    straight, lost = tmp_path / "straight", tmp_path / "lost"
    make_trainer(straight, SETTINGS).train()
    with pytest.raises(TargetUnavailable):
        make_trainer(lost, SETTINGS, target=LostTarget()).train()
    newest = read_checkpoint(lost / "checkpoints" / "latest")
    assert newest.step == 4 and newest.history.last_step == 2
    make_trainer(lost, SETTINGS).train()
    validated = [
        [
            (line["step"], line["validation/accept_length"])
            for line in read_metrics(run / "metrics.jsonl")
            if "validation/accept_length" in line
        ]
        for run in (straight, lost)
    ]
    assert validated[0] == validated[1]
    assert best_checkpoint(straight / "checkpoints").name == best_checkpoint(lost / "checkpoints").name


def test_patience_without_chats_to_validate_with_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.patience must be null without chats .* got 2"):
        make_trainer(tmp_path, replace(SETTINGS, patience=2), validation=None)


def test_an_export_takes_the_best_unless_told_otherwise(tmp_path, scripted):
    scripted(1.1, 1.3, 1.2)
    make_trainer(tmp_path, SETTINGS).train()
    checkpoints = tmp_path / "checkpoints"
    for setting, step in (
        (None, 4),
        ("best", 4),
        ("latest", 20),
        ("20", 20),
        (str(checkpoints / "step_4"), 4),
    ):
        path, checkpoint = _chosen(checkpoints, setting)
        assert checkpoint.step == step and path.parent == checkpoints
    with pytest.raises(CheckpointError, match=r"step_7/checkpoint\.json"):
        _chosen(checkpoints, "7")


def test_an_export_without_a_validation_takes_the_newest(tmp_path):
    make_trainer(tmp_path, SETTINGS, validation=None).train()
    checkpoints = tmp_path / "checkpoints"
    assert _chosen(checkpoints, None)[1].step == 20
    assert not (checkpoints / "best").is_symlink()
    with pytest.raises(
        CheckpointError, match=r"a validated checkpoint for serving\.checkpoint=best, got none"
    ):
        _chosen(checkpoints, "best")
