"""Packed rows over the wire: several whole chats in a row, from targets in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_target import VOCAB_SIZE, tensors_of, tiny_mapping, tiny_target_config
from support.workers import run_workers
from test_service import as_lists, joined, make_target, remote_target, serve

from eagle_rpc.config.schema import TopologyConfig
from eagle_rpc.data import BatchPlan, ChatDataset, Example
from eagle_rpc.supervision import ENCODINGS, Eagle3TargetBackend, SessionSettings
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.topology import Role

pytestmark = pytest.mark.rpc


def packed_plan() -> BatchPlan:
    generator = torch.Generator().manual_seed(4)

    def chat(length: int) -> Example:
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator)
        return Example(ids, torch.rand(length, generator=generator) < 0.7)

    return BatchPlan(
        ChatDataset([chat(3 + n % 14) for n in range(40)], max_length=16), batch_size=2, packed_length=32
    )


def supervision(backend: Eagle3TargetBackend) -> list[dict[str, Any]]:
    """Of one epoch."""
    backend.open_session(tiny_mapping())
    plan = packed_plan()
    return [
        as_lists(tensors_of(batch))
        for batch in backend.stream(plan.batch(number) for number in range(plan.batches_per_epoch))
    ]


def stream_packed() -> Any:
    with joined(TopologyConfig()) as membership:
        if membership.cast.me.has(Role.target):
            return serve(membership, make_target())
        received = {}
        for encoding in ENCODINGS:
            backend = remote_target(membership, encoding=encoding)
            received[encoding] = supervision(backend)
            backend.close()
        membership.mark("done")
        return received


def test_remote_supervision_of_packed_rows_equals_co_located_bit_for_bit():
    _, received = run_workers(stream_packed, 2)
    torch.set_num_threads(1)
    for encoding in ENCODINGS:
        colocated = ColocatedEagle3TargetModel(
            make_target(), tiny_target_config(), SessionSettings(encoding=encoding, rows="position_mask")
        )
        expected = supervision(colocated)
        assert received[encoding] == expected
        assert len(expected) > 3 and sum(len(batch["supervised_rows"]) for batch in expected) > 50


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_verification_of_packed_training_finds_every_bit_equal(tmp_path: Path):
    overrides = ["data.packing=true", "data.row_length=96", "job.verify_topologies=[1x2]"]
    done = subprocess.run(
        [sys.executable, "-m", "eagle_rpc", "job=verify", *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "runs/verify/verify.json").read_text())
    assert [row["encoding"] for row in rows] == ["probs", "logits", "hidden"]
    assert all(row["rows"] > 0 and all(row["equal"].values()) for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training_on_float8_states_gives_the_same_bits_on_both_paths_and_says_that_it_is_not_exact(
    tmp_path: Path,
):
    overrides = ["job.verify_encodings=[hidden_fp8]", "job.verify_topologies=[1x1]"]
    done = subprocess.run(
        [sys.executable, "-m", "eagle_rpc", "job=verify", "data.packing=true", *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not exact: hidden_fp8" in done.stdout
    (row,) = json.loads((tmp_path / "runs/verify/verify.json").read_text())
    assert row["encoding"] == "hidden_fp8" and row["rows"] > 0 and all(row["equal"].values())
