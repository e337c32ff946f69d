import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from training_cases import (
    DRAFT_CONFIG,
    OBJECTIVE,
    TARGET_INFO,
    VOCAB,
    Interrupted,
    InterruptedTarget,
    TableTarget,
    assert_same_bits,
    final_state,
    make_trainer,
    run_record,
    train_config,
    trained_with_a_break,
    without_clock,
)

from eagle_rpc.config.choices import Optimiser, Schedule
from eagle_rpc.config.schema import TrainConfig
from eagle_rpc.data import BatchPlan, ChatDataset, Example
from eagle_rpc.errors import CheckpointError
from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.train.checkpoint import (
    latest_checkpoint,
    latest_whole_checkpoint,
    load_target_embedding,
    read_checkpoint,
)

SETTINGS = train_config(max_steps=10, accumulation=2, log_every=2, checkpoint_every=3, validate_every=5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed")
    trainer = make_trainer(path, SETTINGS)
    trainer.train()
    names = sorted(path.name for path in (path / "checkpoints").iterdir())
    return final_state(trainer), without_clock(read_metrics(path / "metrics.jsonl")), names


def resume_and_compare(path, undisturbed):
    trainer = make_trainer(path, SETTINGS)
    trainer.train()
    state, lines, _ = undisturbed
    assert_same_bits(final_state(trainer), state)
    assert without_clock(read_metrics(path / "metrics.jsonl")) == lines


# Micro-batches: before the first checkpoint, after it, in the middle of a step and of a validation, before
# the end.
@pytest.mark.parametrize("interrupted_at", [0, 5, 7, 10, 11, 16, 22, 33])
def test_an_interrupted_run_ends_as_one_left_alone(tmp_path, undisturbed, interrupted_at):
    with pytest.raises(Interrupted):
        make_trainer(tmp_path, SETTINGS, target=InterruptedTarget(interrupted_at)).train()
    resume_and_compare(tmp_path, undisturbed)


def test_a_run_interrupted_many_times_ends_as_one_left_alone(tmp_path, undisturbed):
    for interrupted_at in (9, 8, 3, 8):
        with pytest.raises(Interrupted):
            make_trainer(tmp_path, SETTINGS, target=InterruptedTarget(interrupted_at)).train()
    resume_and_compare(tmp_path, undisturbed)


def test_real_batch_plans_resume_where_they_were(tmp_path):
    def chat(index: int) -> Example:
        length = 5 + index % 7
        return Example(torch.arange(length) * (index + 1) % VOCAB, torch.arange(length) >= 2)

    chats = ChatDataset([chat(index) for index in range(9)], max_length=16)
    plans = {"batches": BatchPlan(chats, batch_size=2, seed=3), "validation": BatchPlan(chats, batch_size=2)}
    straight = make_trainer(tmp_path / "straight", SETTINGS, **plans)
    straight.train()
    resumed = trained_with_a_break(partial(make_trainer, tmp_path / "resumed", SETTINGS, **plans), at=19)
    assert_same_bits(final_state(resumed), final_state(straight))


def run_with_a_break(path: Path, settings: TrainConfig, *, at: int = 19) -> None:
    """Trains once through and once with a break; both end with the same bits and figures."""
    straight = make_trainer(path / "straight", settings)
    straight.train()
    resumed = trained_with_a_break(partial(make_trainer, path / "resumed", settings), at=at)
    assert_same_bits(final_state(resumed), final_state(straight))
    lines = [without_clock(read_metrics(path / name / "metrics.jsonl")) for name in ("straight", "resumed")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("schedule", Schedule)
def test_a_run_resumes_along_the_same_rates(tmp_path, schedule):
    run_with_a_break(tmp_path, replace(SETTINGS, schedule=schedule))


def test_a_run_with_muon_resumes_bit_for_bit(tmp_path):
    run_with_a_break(tmp_path, replace(SETTINGS, optimiser=Optimiser.muon, weight_decay=0.1))


def test_a_run_with_averaged_weights_resumes_bit_for_bit(tmp_path):
    run_with_a_break(tmp_path, replace(SETTINGS, ema_decay=0.9))


def test_a_run_with_noise_resumes_bit_for_bit(tmp_path):
    run_with_a_break(tmp_path, replace(SETTINGS, aux_noise=0.1))


def test_a_run_with_everything_at_once_resumes_bit_for_bit(tmp_path):
    changes = {"optimiser": Optimiser.muon, "schedule": Schedule.wsd, "ema_decay": 0.9, "aux_noise": 0.1}
    run_with_a_break(tmp_path, replace(SETTINGS, **changes), at=23)


def test_a_finished_run_has_nothing_left_to_do(tmp_path, undisturbed):
    make_trainer(tmp_path, SETTINGS).train()
    target = TableTarget()
    make_trainer(tmp_path, SETTINGS, target=target).train()
    assert target.batches_delivered == 0
    assert without_clock(read_metrics(tmp_path / "metrics.jsonl")) == undisturbed[1]


# A worker that kills itself with SIGKILL at the n-th fsync of the process, or the n-th batch; nothing of
# Python runs after.
WORKER = """
import os, signal, sys
from pathlib import Path
from test_resume import SETTINGS
from training_cases import TableTarget, make_trainer

path, event, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
count = 0

def die_at(function):
    def counted(*arguments, **named):
        global count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return counted

if event == "fsync":
    os.fsync = die_at(os.fsync)
elif event == "removal":
    from eagle_rpc.process import files
    files.shutil.rmtree = die_at(files.shutil.rmtree)
else:
    TableTarget.deliver = die_at(TableTarget.deliver)
make_trainer(path, SETTINGS).train()
"""


def run_until_killed(path: Path, event: str, number: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    worker = subprocess.run(
        [sys.executable, "-c", WORKER, str(path), event, str(number)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert worker.returncode == -signal.SIGKILL, worker.stderr


@pytest.mark.parametrize(
    ("event", "number"), [("batch", 17), ("fsync", 9), ("fsync", 13), ("fsync", 14), ("removal", 10)]
)
def test_a_killed_process_ends_as_one_left_alone(tmp_path, undisturbed, event, number):
    run_until_killed(tmp_path, event, number)
    resume_and_compare(tmp_path, undisturbed)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == undisturbed[2]
    assert {"latest", "best", "step_10", "step_9", "target_embedding.safetensors"} <= set(names)


@pytest.fixture
def interrupted(tmp_path):
    with pytest.raises(Interrupted):
        make_trainer(tmp_path, SETTINGS, target=InterruptedTarget(8)).train()
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"draft_config": replace(DRAFT_CONFIG, rope_theta=500.0)},
            r"draft\.rope_theta must be the checkpoint's to resume, it has 10000\.0, this run has 500\.0",
        ),
        (
            {"target": replace(TARGET_INFO, weights_fingerprint="other")},
            "weights_fingerprint .* it has weights, this run has other",
        ),
        ({"init_digest": "new"}, r"the digest of draft\.init_from .* it has None, this run has new"),
        ({"data_digest": "new"}, "the training data's digest .* it has None, this run has new"),
        (
            {"config": run_record(replace(SETTINGS, batch_size=5)).config},
            r"train\.batch_size .* it has 2, this run has 5",
        ),
        (
            {"config": run_record(replace(SETTINGS, optimiser=Optimiser.muon)).config},
            r"train\.optimiser .* it has adamw, this run has muon",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(interrupted, changes, message):
    with pytest.raises(CheckpointError, match=message):
        make_trainer(interrupted, SETTINGS, record=replace(run_record(SETTINGS), **changes)).train()


def test_a_restarted_target_and_longer_training_are_accepted(interrupted, caplog):
    longer = replace(SETTINGS, max_steps=12)
    record = run_record(longer, target=replace(TARGET_INFO, incarnation="second"))
    make_trainer(interrupted, longer, record=record).train()
    assert "resuming with train.max_steps=12; the checkpoint was made with 10" in caplog.text
    assert latest_checkpoint(interrupted / "checkpoints").name == "step_12"


def damage(checkpoint: Path) -> None:
    weights = checkpoint / "draft.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def test_a_damaged_checkpoint_is_named_if_there_is_no_whole_one(interrupted):
    for checkpoint in (interrupted / "checkpoints").glob("step_*"):
        damage(checkpoint)
    with pytest.raises(CheckpointError, match=r"step_3/draft\.safetensors must be a whole safetensors file"):
        make_trainer(interrupted, SETTINGS).train()


def test_a_run_goes_on_from_the_newest_whole_checkpoint_to_the_same_weights(tmp_path, undisturbed, caplog):
    with pytest.raises(Interrupted):
        make_trainer(tmp_path, SETTINGS, target=InterruptedTarget(24)).train()
    damage(latest_checkpoint(tmp_path / "checkpoints"))
    found = latest_whole_checkpoint(tmp_path / "checkpoints")
    assert found is not None and found[0].name == "step_5" and found[1].step == 5
    resume_and_compare(tmp_path, undisturbed)
    warning = (
        r"going back to .*step_5, since a newer checkpoint is damaged: .*step_6/draft\.safetensors must be"
    )
    assert re.search(warning, caplog.text)


def test_a_run_that_was_copied_without_the_embedding_writes_it_again(interrupted):
    embedding = interrupted / "checkpoints" / "target_embedding.safetensors"
    content = embedding.read_bytes()
    embedding.unlink()
    with pytest.raises(
        CheckpointError, match=r"must hold the target's token embedding, .* train\.resume=auto"
    ):
        load_target_embedding(embedding)
    make_trainer(interrupted, SETTINGS).train()
    assert embedding.read_bytes() == content


def test_a_checkpoint_of_another_format_is_refused(interrupted):
    for facts in (interrupted / "checkpoints").glob("step_*/checkpoint.json"):
        facts.write_text(facts.read_text().replace('"format_version": 2', '"format_version": 7'))
    with pytest.raises(CheckpointError, match="format_version must be 2, got 7"):
        make_trainer(interrupted, SETTINGS).train()


def test_a_checkpoint_holds_what_an_export_needs(interrupted):
    checkpoint = read_checkpoint(latest_checkpoint(interrupted / "checkpoints"))
    record = run_record(SETTINGS)
    assert checkpoint.record == replace(record, mapping=checkpoint.record.mapping)
    assert checkpoint.record.mapping.digest == record.mapping.digest
    assert "embed_tokens.weight" not in checkpoint.draft_weights
    assert len(checkpoint.draft_weights) == 13
    assert OBJECTIVE.ttt_steps == checkpoint.record.config["draft"]["ttt_steps"]
