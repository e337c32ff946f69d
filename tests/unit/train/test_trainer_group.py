import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training_cases import (
    assert_same_bits,
    final_state,
    make_trainer,
    random_draft,
    train_config,
    without_clock,
)

from eagle_rpc.errors import ConfigError, ConnectionLost, WaitTimeout
from eagle_rpc.process import bind_to_interface
from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.train.distributed import TrainerGroup, join_trainers

MICRO_BATCHES_PER_STEP = 6
TIMEOUT = 60.0


def settings_of(size: int):
    return train_config(
        max_steps=4,
        accumulation=MICRO_BATCHES_PER_STEP // size,
        autocast=None,
        log_every=1,
        validation_batches=5,
    )


def train_one(rank: int, size: int, path: Path) -> None:
    """Trains, then meets what can go wrong between trainers; writes down how it went."""
    bind_to_interface("lo")
    store = dist.FileStore(str(path / "store"), size)
    messages = {}
    with join_trainers(store, rank, size, timeout=TIMEOUT) as group:
        trainer = make_trainer(path / "run", settings_of(size), group=group)
        trainer.train()
        torch.save(final_state(trainer), path / f"state_{rank}.pt")
        stop = threading.Event()
        if rank == size - 1:  # told to stop, the others are not
            stop.set()
        stopped = make_trainer(path / "stopped", settings_of(size), group=group, stop=stop)
        stopped.train()
        messages["stopped_after"] = stopped.learner.steps_done
        try:
            make_trainer(
                path / "unlike", settings_of(size), group=group, draft=random_draft(seed=rank)
            ).train()
        except ConfigError as error:
            messages["unlike"] = str(error)
        if rank == 0:  # the others leave
            try:
                group.sum_(torch.ones(3), "ones")
            except ConnectionLost as error:
                messages["gone"] = str(error)
    (path / f"messages_{rank}.json").write_text(json.dumps(messages))
    # torch sometimes aborts while it tears down the group of a refused training; all that is tested has
    # happened.
    os._exit(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directories of the same training by one, two and three trainers."""
    paths = {}
    for size in (1, 2, 3):
        paths[size] = tmp_path_factory.mktemp(f"trainers_{size}")
        if size == 1:
            trainer = make_trainer(paths[1] / "run", settings_of(1))
            trainer.train()
            torch.save(final_state(trainer), paths[1] / "state_0.pt")
        else:
            mp.spawn(train_one, (size, paths[size]), nprocs=size)
    return paths


def state(path: Path, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(path / f"state_{rank}.pt", weights_only=True)


@pytest.mark.parametrize("size", [2, 3])
def test_all_trainers_end_with_the_same_bits(trained, size):
    for rank in range(1, size):
        assert_same_bits(state(trained[size], rank), state(trained[size], 0))


@pytest.mark.parametrize("size", [2, 3])
def test_a_stop_of_one_trainer_stops_all_after_the_same_step(trained, size):
    for rank in range(size):
        assert json.loads((trained[size] / f"messages_{rank}.json").read_text())["stopped_after"] == 0


@pytest.mark.parametrize("size", [2, 3])
def test_figures_do_not_depend_on_the_number_of_trainers(trained, size):
    alone, together = (without_clock(read_metrics(trained[s] / "run" / "metrics.jsonl")) for s in (1, size))
    assert len(alone) == len(together) == 5
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            # Rounding of the sums passes through the optimiser from one step to the next.
            assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-6), (one["step"], name)
    first, also_first = alone[0], together[0]
    assert also_first["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert also_first["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_only_the_first_trainer_writes(trained, size):
    checkpoints = trained[size] / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "best",
        "latest",
        "step_3",
        "step_4",
        "target_embedding.safetensors",
    ]


@pytest.mark.parametrize("size", [2, 3])
def test_trainers_that_start_unlike_are_refused_on_every_one(trained, size):
    for rank in range(size):
        message = json.loads((trained[size] / f"messages_{rank}.json").read_text())["unlike"]
        assert message.startswith("the draft at the start must be equal on all trainers, got ")
        assert message.endswith("on trainer 1")


def test_a_trainer_that_left_is_noticed(trained):
    assert json.loads((trained[2] / "messages_0.json").read_text())["gone"].startswith(
        "trainer 0 of 2, waiting for the sum of ones: "
    )


def test_trainers_that_never_come_end_the_wait():
    bind_to_interface("lo")
    message = "trainer 0, waiting for 2 trainers to join: gave up after 1 s"
    with pytest.raises(WaitTimeout, match=message), join_trainers(dist.HashStore(), 0, 2, timeout=1.0):
        pass


def test_one_trainer_needs_no_process_group():
    with join_trainers(dist.HashStore(), 0, 1, timeout=1.0) as group:
        assert not dist.is_initialized()
        group.barrier("nobody")
        group.require_equal({"anything": hashlib.sha256().hexdigest()})
        assert torch.equal(group.sum_(torch.arange(3), "numbers"), torch.arange(3))
        assert TrainerGroup().is_primary
