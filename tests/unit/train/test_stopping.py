"""Training that is told to stop, or that loses its targets, keeps its steps and goes on later as if nothing
had been.
"""

import threading
from pathlib import Path

import pytest
from training_cases import TableTarget, assert_same_bits, final_state, make_trainer, train_config

from eagle_rpc.errors import ConnectionLost, EagleRpcError, TargetUnavailable
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.checkpoint import latest_checkpoint

SETTINGS = train_config(max_steps=9, checkpoint_every=100, accumulation=2)


class EventfulTarget(TableTarget):
    """Something happens when it is about to deliver batch number `at`, counted from 0."""

    def __init__(self, at: int, happens) -> None:
        super().__init__()
        self._at = at
        self._happens = happens

    def deliver(self, tokens):
        if self.batches_delivered == self._at:
            self._happens()
        return super().deliver(tokens)


def checkpoint_name(run: Path) -> str | None:
    newest = latest_checkpoint(run / "checkpoints")
    return newest.name if newest else None


def check_that_it_goes_on(run: Path, undisturbed: Path) -> None:
    """A trainer that continues `run` ends as one that was never disturbed."""
    resumed, straight = make_trainer(run, SETTINGS), make_trainer(undisturbed, SETTINGS)
    for trainer in (resumed, straight):
        trainer.train()
    assert_same_bits(final_state(resumed), final_state(straight))


def test_a_trainer_that_is_told_to_stop_ends_its_step_and_writes_a_checkpoint(tmp_path):
    stop = threading.Event()
    # Batch 6 is the first of the two micro-batches of step 4.
    make_trainer(tmp_path / "stopped", SETTINGS, target=EventfulTarget(6, stop.set), stop=stop).train()
    assert checkpoint_name(tmp_path / "stopped") == "step_4"
    check_that_it_goes_on(tmp_path / "stopped", tmp_path / "undisturbed")


@pytest.mark.parametrize("error", [TargetUnavailable("no target"), ConnectionLost("another trainer is gone")])
def test_a_trainer_that_loses_its_targets_keeps_its_whole_steps_and_raises(
    tmp_path, error: EagleRpcError, caplog
):
    def lose() -> None:
        raise error

    caplog.set_level("INFO")
    # Batch 7 is the second micro-batch of step 4, which is therefore not whole.
    with pytest.raises(type(error)):
        make_trainer(tmp_path / "lost", SETTINGS, target=EventfulTarget(7, lose)).train()
    assert checkpoint_name(tmp_path / "lost") == "step_3"
    assert f"interrupted by {type(error).__name__}: the run goes on from step 3" in caplog.text
    check_that_it_goes_on(tmp_path / "lost", tmp_path / "undisturbed")


def test_where_a_part_of_the_weights_is_gone_with_a_trainer_the_last_checkpoint_stays_the_newest(
    tmp_path, caplog
):
    group = TrainerGroup()
    caplog.set_level("INFO")

    def lose() -> None:
        group.broken = True
        raise ConnectionLost("another trainer is gone")

    settings = train_config(max_steps=9, checkpoint_every=2, accumulation=2)
    trainer = make_trainer(tmp_path, settings, group=group, target=EventfulTarget(7, lose))
    trainer.learner._masters.sharded = True
    with pytest.raises(ConnectionLost):
        trainer.train()
    assert checkpoint_name(tmp_path) == "step_2"
    assert "no checkpoint of step 3" in caplog.text and "the run goes on from step 2" in caplog.text


def test_nothing_is_written_where_no_step_was_done(tmp_path):
    stop = threading.Event()
    stop.set()
    make_trainer(tmp_path, SETTINGS, stop=stop).train()
    assert checkpoint_name(tmp_path) is None


def test_a_checkpoint_of_this_very_step_is_not_written_again(tmp_path, caplog):
    stop = threading.Event()
    settings = train_config(max_steps=9, checkpoint_every=2, accumulation=2)
    caplog.set_level("INFO")
    make_trainer(tmp_path, settings, target=EventfulTarget(6, stop.set), stop=stop).train()
    assert caplog.text.count("saved") == 2 and checkpoint_name(tmp_path) == "step_4"
