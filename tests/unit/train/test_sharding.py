"""Trainers that share out master weights, optimiser state and reduced gradients, beside trainers that each hold all."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from training_cases import (
    StoppingTarget,
    TableTarget,
    assert_same_bits,
    final_state,
    make_trainer,
    random_draft,
    train_config,
    without_clock,
)

from eagle_rpc.config.choices import Optimiser, Sharding
from eagle_rpc.draft.fused import FusedStep
from eagle_rpc.errors import ConfigError, TargetFailed, TargetUnavailable
from eagle_rpc.process import bind_to_interface
from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.train.checkpoint import latest_checkpoint, read_checkpoint
from eagle_rpc.train.distributed import join_trainers
from eagle_rpc.train.learner import Learner

# Nothing is clipped, so nothing depends on how the global norm is summed up.
SETTINGS = train_config(
    max_steps=5, accumulation=2, max_grad_norm=1e9, log_every=1, checkpoint_every=2, keep_checkpoints=9
)
SHARDED = replace(SETTINGS, sharding=Sharding.state)
CLIPPED = replace(SETTINGS, max_grad_norm=0.05, autocast=None)
FUSED = replace(SETTINGS, autocast=None)
AVERAGED = replace(SETTINGS, ema_decay=0.5)


class FailingTarget(TableTarget):
    """Fails when it is asked for another batch than so many."""

    def deliver(self, tokens):
        if self.batches_delivered == 7:
            raise TargetFailed("out of order")
        return super().deliver(tokens)


def bytes_held(learner: Learner) -> int:
    """Of weights and moments."""
    moments = [tensor for name, tensor in learner._optimiser.tensors().items() if name.startswith("exp_avg")]
    tensors = [*learner.parameters.values(), *moments]
    return sum((t.to_local() if isinstance(t, DTensor) else t).numel() * t.element_size() for t in tensors)


def run_all(rank: int, size: int, path: Path) -> None:
    bind_to_interface("lo")
    with join_trainers(dist.FileStore(str(path / "store"), size), rank, size, timeout=60.0) as group:
        notes = {}

        def train(name, settings, **changes):
            trainer = make_trainer(path / name, settings, group=group, **changes)
            trainer.train()
            torch.save(final_state(trainer), path / f"{name}_{rank}.pt")
            notes[name] = {"bytes": bytes_held(trainer.learner), "digest": trainer.learner.digest()}

        for sharding in Sharding:
            train(f"plain_{sharding.name}", replace(SETTINGS, sharding=sharding))
            train(f"clipped_{sharding.name}", replace(CLIPPED, sharding=sharding))
            train(f"averaged_{sharding.name}", replace(AVERAGED, sharding=sharding))
        train("muon", replace(SETTINGS, optimiser=Optimiser.muon, aux_noise=0.1))
        stop = threading.Event()
        make_trainer(
            path / "resumed", SHARDED, group=group, target=StoppingTarget(5, stop), stop=stop
        ).train()
        train("resumed", SHARDED)
        for first, second in ((SETTINGS, SHARDED), (SHARDED, SETTINGS)):
            name, stop = f"{first.sharding.name}_to_{second.sharding.name}", threading.Event()
            make_trainer(path / name, first, group=group, target=StoppingTarget(5, stop), stop=stop).train()
            train(name, second)
        try:
            make_trainer(path / "unlike", SHARDED, group=group, draft=random_draft(seed=rank))
        except ConfigError as error:
            notes["unlike"] = str(error)
        try:
            target = FailingTarget() if rank == size - 1 else TableTarget()
            make_trainer(path / "failing", SHARDED, group=group, target=target).train()
        except (TargetFailed, TargetUnavailable) as error:
            notes["failing"] = f"{type(error).__name__}: {error}"
        FusedStep.supports = staticmethod(lambda draft, dtype: True)
        for sharding in Sharding:
            train(f"fused_{sharding.name}", replace(FUSED, sharding=sharding))
    (path / f"notes_{rank}.json").write_text(json.dumps(notes))
    # torch sometimes aborts while it tears down the group of a refused training; all that is tested has
    # happened.
    os._exit(0)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def trained(request, tmp_path_factory) -> tuple[int, Path]:
    """Number of trainers, three of which share rows unevenly, and the directory of all their runs."""
    path = tmp_path_factory.mktemp(f"trainers_{request.param}")
    mp.spawn(run_all, (request.param, path), nprocs=request.param)
    return request.param, path


def state(path: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(path / f"{name}_{rank}.pt", weights_only=True)


def notes(path: Path, rank: int) -> dict:
    return json.loads((path / f"notes_{rank}.json").read_text())


@pytest.mark.parametrize("run", ["plain", "fused", "averaged"])
def test_sharded_training_ends_as_replicated_training(trained, run):
    size, path = trained
    sharded, replicated = state(path, f"{run}_state"), state(path, f"{run}_none")
    if size == 2:
        assert_same_bits(sharded, replicated)
    # From three on the sum over trainers goes round them in another order.
    for name, tensor in replicated.items():
        torch.testing.assert_close(
            sharded[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_clipping_by_a_norm_over_parts_differs_by_rounding_alone(trained):
    _, path = trained
    sharded, replicated = state(path, "clipped_state"), state(path, "clipped_none")
    for name, tensor in replicated.items():
        torch.testing.assert_close(
            sharded[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    figures = [
        list(read_metrics(path / name / "metrics.jsonl")) for name in ("clipped_state", "clipped_none")
    ]
    norms = [[line["grad_norm"] for line in lines if "grad_norm" in line] for lines in figures]
    assert min(norms[0]) > CLIPPED.max_grad_norm
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    "run", ["plain_state", "clipped_state", "fused_state", "averaged_state", "muon", "resumed"]
)
def test_all_trainers_have_the_same_weights(trained, run):
    size, path = trained
    assert len({notes(path, rank)[run]["digest"] for rank in range(size)}) == 1
    for rank in range(1, size):
        assert_same_bits(state(path, run, rank), state(path, run))


def test_each_trainer_holds_its_part_of_weights_and_moments(trained):
    size, path = trained
    whole = notes(path, 0)["plain_none"]["bytes"]
    held = [notes(path, rank)["plain_state"]["bytes"] for rank in range(size)]
    assert sum(held) == whole
    # Rows that do not divide go to the first trainers.
    assert max(held) <= 1.15 * whole / size


def test_a_sharded_run_resumes_bit_for_bit(trained):
    _, path = trained
    assert_same_bits(state(path, "resumed"), state(path, "plain_state"))
    resumed, straight = (
        without_clock(read_metrics(path / name / "metrics.jsonl")) for name in ("resumed", "plain_state")
    )
    assert resumed == straight


def test_a_run_goes_on_with_the_other_setting(trained):
    size, path = trained
    for name in ("none_to_state", "state_to_none"):
        if size == 2:
            assert_same_bits(state(path, name), state(path, "plain_none"))
        assert notes(path, 0)[name]["digest"] == notes(path, 1)[name]["digest"]


def test_checkpoints_look_as_those_of_replicated_runs(trained):
    size, path = trained
    sharded, replicated = (
        latest_checkpoint(path / name / "checkpoints") for name in ("plain_state", "plain_none")
    )
    for name in ("draft.safetensors", "optimiser.safetensors", "vocab_mapping.safetensors"):
        if size == 2:
            assert (sharded / name).read_bytes() == (replicated / name).read_bytes()
    states = [read_checkpoint(path).state for path in (sharded, replicated)]
    assert states[0].weights.keys() == states[1].weights.keys()


def test_a_checkpoint_of_several_trainers_is_one_trainers_too(trained):
    _, path = trained
    checkpoint = read_checkpoint(latest_checkpoint(path / "plain_state" / "checkpoints"))
    learner = make_trainer(path / "alone", SHARDED).learner
    learner.load(checkpoint.state, checkpoint.step)
    assert_same_bits({name: tensor.detach() for name, tensor in learner.weights()}, checkpoint.state.weights)
    assert_same_bits(dict(learner.optimiser_state()), checkpoint.state.optimiser)


def test_drafts_that_differ_are_refused_before_their_parts_mix(trained):
    size, path = trained
    for rank in range(size):
        assert notes(path, rank)["unlike"].startswith(
            "the draft at the start must be equal on all trainers, got "
        )


def test_a_trainer_that_loses_its_target_keeps_the_others_long_enough_for_a_checkpoint(trained):
    size, path = trained
    assert notes(path, size - 1)["failing"] == "TargetFailed: out of order"
    for rank in range(size - 1):
        assert notes(path, rank)["failing"].startswith(
            f"TargetUnavailable: trainer {rank} of {size}: another trainer did not get"
        )
    assert latest_checkpoint(path / "failing" / "checkpoints").name == "step_3"
