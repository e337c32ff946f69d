"""A target of two and three stages in processes of their own over real RPC: the bits of one process."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rpc.test_elastic import check_batches, stream_on_demand
from support.elastic import HEARTBEATS, Registry, Worker
from support.families import tiny_config
from support.staged_service import (
    assert_bits_of_one_process,
    elastic_config,
    lose_a_stage,
    run_job,
    serve_stage,
    staged_config,
)
from support.waiting import until

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.target.model import HFEagle3TargetModel

pytestmark = [pytest.mark.rpc, pytest.mark.slow]

# Not in the order of the layers.
AUX = [4, 0, 2]
SECONDS = 120.0


def target_config(family: str) -> TargetConfig:
    changes: dict[str, Any] = {"num_hidden_layers": 6, "initializer_range": 0.3}
    if family == "gemma3_text":
        changes["layer_types"] = None
    fields = tiny_config(family, **changes).to_dict()
    return TargetConfig(model="tiny", random=fields, dtype=DType.float32, device="cpu", aux_layer_ids=AUX)


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "qwen3_moe"])
def test_stages_in_processes_of_their_own_give_the_bits_of_one_process(family: str, num_stages: int):
    config = target_config(family)
    answers = run_job(staged_config(config, num_stages))
    target = HFEagle3TargetModel.load(config, "cpu", cache_dir="unused", seed=0)
    assert_bits_of_one_process(answers, target, config)


def test_a_static_job_ends_with_the_stage_that_was_lost():
    config = staged_config(target_config("llama"), 2)
    trainers, targets = lose_a_stage(
        dataclasses.replace(config, rpc=dataclasses.replace(config.rpc, **HEARTBEATS))
    )
    assert trainers.startswith("TargetUnavailable: no target could be reached")
    assert "a static job gets no other" in trainers and "target0.1" in trainers
    assert (
        "ConnectionLost: this target has lost one of its stages and ends" in targets
        and "target0.1" in targets
    )


class StagedService:
    """Targets of two stages of one registry, each stage a process."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.config = elastic_config(2, registry.address, str(registry.token_file))
        self.workers: dict[str, Worker] = {}

    def start(self, target: int, stage: int) -> Worker:
        name = f"target{target}.{stage}"
        self.workers[name] = Worker(serve_stage, target, stage, self.config)
        return self.workers[name]

    def start_targets(self, count: int) -> None:
        firsts = [self.start(number, 0) for number in range(count)]
        for number in range(count):
            self.start(number, 1)
        for first in firsts:
            first.receive(SECONDS)

    def status_of(self, name: str) -> dict[str, Any]:
        return next(
            (one.record.status for one in self.registry.client.records() if one.record.name == name), {}
        )

    def until(self, name: str, draining: bool) -> dict[str, Any]:
        def there() -> bool:
            return self.status_of(name).get("draining") is draining

        until(
            there, f"{name} has draining {draining}", seconds=SECONDS, seen=lambda: str(self.status_of(name))
        )
        return self.status_of(name)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[StagedService]:
    registry = Registry(tmp_path)
    made = StagedService(registry)
    yield made
    for worker in made.workers.values():
        worker.end()
    registry.end()


def start_trainer(service: StagedService) -> Worker:
    registry = service.registry
    service.workers["trainer0"] = Worker(stream_on_demand, "trainer0", registry.address, registry.token)
    return service.workers["trainer0"]


def test_a_stage_that_is_killed_takes_its_target_out_and_no_batch_is_lost(service: StagedService):
    """Its registry entry says why, and once the stage is back the target serves on, with the sessions that it had."""
    service.start_targets(2)
    trainer = start_trainer(service)
    check_batches(trainer, range(3))
    seed = 3
    for _ in range(2):
        service.workers["target0.1"].end()
        status = check_batches(trainer, range(seed, seed + 4))
        assert "target0.1" in service.until("target0", draining=True)["paused"]
        service.start(0, 1)
        service.until("target0", draining=False)
        seed += 4
        before = {one["name"]: one["incarnation"] for one in status["targets"]}
        status = check_batches(trainer, range(seed, seed + 3))
        seed += 3
        assert before.items() <= {one["name"]: one["incarnation"] for one in status["targets"]}.items()


def test_the_first_stage_that_is_killed_returns_to_the_stages_that_are_still_there(service: StagedService):
    service.start_targets(1)
    trainer = start_trainer(service)
    first = check_batches(trainer, range(2))["targets"][0]["incarnation"]
    service.workers["target0.0"].end()
    service.start(0, 0).receive(SECONDS)
    assert check_batches(trainer, range(2, 6))["targets"][0]["incarnation"] != first


def test_a_stage_that_is_stopped_takes_its_target_out_until_it_goes_on(service: StagedService):
    service.start_targets(2)
    trainer = start_trainer(service)
    check_batches(trainer, range(2))
    os.kill(service.workers["target0.1"].process.pid, signal.SIGSTOP)
    service.until("target0", draining=True)
    check_batches(trainer, range(2, 8))
    os.kill(service.workers["target0.1"].process.pid, signal.SIGCONT)
    service.until("target0", draining=False)
    check_batches(trainer, range(8, 12))


def test_a_stage_that_is_told_to_end_is_announced_before(service: StagedService):
    service.start_targets(2)
    trainer = start_trainer(service)
    check_batches(trainer, range(2))
    service.workers["target0.1"].send("end")
    assert "target0.1 is shutting down" in service.until("target0", draining=True)["paused"]
    check_batches(trainer, range(2, 8))
    service.workers["target0.1"].process.join(SECONDS)
    assert service.workers["target0.1"].process.exitcode == 0
