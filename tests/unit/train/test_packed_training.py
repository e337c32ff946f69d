"""Training, resuming and validating on packed rows."""

import threading
from dataclasses import replace

import pytest
import torch
from training_cases import (
    OBJECTIVE,
    VOCAB,
    StoppingTarget,
    TableTarget,
    assert_same_bits,
    final_state,
    make_trainer,
    random_draft,
    run_record,
    train_config,
    without_clock,
)

from eagle_rpc.data import BatchPlan, ChatDataset, Example
from eagle_rpc.errors import CheckpointError
from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.train.checkpoint import latest_checkpoint
from eagle_rpc.train.distributed import TrainerGroup
from eagle_rpc.train.figures import figures_of
from eagle_rpc.train.learner import Learner
from eagle_rpc.train.record import require_same_run

SETTINGS = train_config(max_steps=10, accumulation=2, log_every=2, checkpoint_every=3, validate_every=5)


def chats() -> ChatDataset:
    generator = torch.Generator().manual_seed(1)

    def chat(index: int) -> Example:
        length = 4 + index % 9
        return Example(torch.randint(0, VOCAB, (length,), generator=generator), torch.arange(length) >= 2)

    return ChatDataset([chat(index) for index in range(31)], max_length=16)


def packed_plan(**options) -> BatchPlan:
    return BatchPlan(chats(), packed_length=24, **{"batch_size": 2, "seed": 3, **options})


@pytest.mark.parametrize("stopped_at", [5, 12, 17])
def test_a_packed_run_resumes_bit_for_bit(tmp_path, stopped_at):
    plans = {"batches": packed_plan(), "validation": packed_plan(seed=0)}
    straight = make_trainer(tmp_path / "straight", SETTINGS, **plans)
    straight.train()
    stop = threading.Event()
    make_trainer(
        tmp_path / "resumed", SETTINGS, target=StoppingTarget(stopped_at, stop), stop=stop, **plans
    ).train()
    assert latest_checkpoint(tmp_path / "resumed" / "checkpoints").name != "step_10"
    resumed = make_trainer(tmp_path / "resumed", SETTINGS, **plans)
    resumed.train()
    assert_same_bits(final_state(resumed), final_state(straight))
    lines = [
        without_clock(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("straight", "resumed")
    ]
    assert lines[0] == lines[1]


def test_validation_figures_do_not_depend_on_packing():
    data, target = chats(), TableTarget()
    learner = Learner(random_draft(), SETTINGS, OBJECTIVE, TrainerGroup(), total_steps=1)
    figures = []
    for plan in (packed_plan(endless=False), BatchPlan(data, batch_size=len(data))):
        sums = learner.empty_sums()
        for number in range(plan.batches_per_epoch):
            learner.judge(target.supervise(plan.batch(number)), sums)
        figures.append(
            {**figures_of(sums.on_host(), learner.step_weights), "tokens": float(sums.on_host()["tokens"])}
        )
    packed, padded = figures
    assert padded["tokens"] == sum(len(example.input_ids) for example in data)
    for name, value in padded.items():
        # Matrix products run in bfloat16.
        assert packed[name] == pytest.approx(value, rel=2e-2), name
    for name in ("tokens", "supervised_tokens"):
        assert packed[name] == padded[name]


@pytest.mark.parametrize("changes", [{"packing": True}, {"packing": True, "row_length": 4096}])
def test_a_run_does_not_resume_with_other_packing(changes):
    record = run_record(SETTINGS)
    other = {**record.config, "data": {**record.config["data"], **changes}}
    with pytest.raises(
        CheckpointError,
        match=r"data\.packing must be the checkpoint's to resume, it has False, this run has True",
    ):
        require_same_run(record, replace(record, config=other))


def test_a_checkpoint_from_before_packing_resumes_without_it():
    record = run_record(SETTINGS)
    data = {
        name: value for name, value in record.config["data"].items() if name not in ("packing", "row_length")
    }
    require_same_run(replace(record, config={**record.config, "data": data}), record)
