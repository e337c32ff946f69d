"""`job=drain` takes targets out of a service that trains: processes of their own over real RPC."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.elastic import (
    HEARTBEATS,
    WAIT,
    Link,
    Registry,
    Worker,
    remote_target,
    serve_as_a_job,
    service_config,
)
from support.tiny_target import tensors_of, tiny_batch, tiny_mapping, tiny_target_config
from support.waiting import until

from eagle_rpc.registry import Beat, Record
from eagle_rpc.supervision import SessionSettings, tensors_digest
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

pytestmark = pytest.mark.rpc

# Batches that the trainer asks for again and again.
NUM_BATCHES = 16


def stream_until_told(link: Link, name: str, address: str, token: bytes) -> None:
    """A trainer that streams without a pause; says the digests of its batches, in their order, in the end."""
    told = threading.Event()
    threading.Thread(target=lambda: (link.receive_forever(), told.set()), daemon=True).start()
    found: list[str] = []
    with remote_target(name, address, token) as backend:
        backend.open_session(tiny_mapping())
        for batch in backend.stream(tiny_batch(number % NUM_BATCHES) for number in itertools.count()):
            found.append(digest(batch))
            if len(found) == NUM_BATCHES:
                link.send("streaming")
            if told.is_set():
                break
    link.send(found)


def digest(batch: Any) -> str:
    return tensors_digest(tensors_of(batch).items())


def expected_digests() -> list[str]:
    config = tiny_target_config()
    target = HFEagle3TargetModel.load(config, "cpu", cache_dir="unused", seed=0)
    backend = ColocatedEagle3TargetModel(target, config, SessionSettings())
    backend.open_session(tiny_mapping())
    batches = (tiny_batch(seed) for seed in range(NUM_BATCHES))
    return [
        digest(backend.generate_batch(one.input_ids, one.attention_mask, one.loss_mask)) for one in batches
    ]


@pytest.fixture
def workers() -> Iterator[dict[str, Worker]]:
    started: dict[str, Worker] = {}
    yield started
    for worker in started.values():
        worker.end()


def drain(registry: Registry, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eagle_rpc", "job=drain", f"rpc.registry={registry.address}"]
    return subprocess.run(
        [*command, f"rpc.token_file={registry.token_file}", *overrides],
        capture_output=True,
        text=True,
        timeout=2 * WAIT,
        check=False,
    )


def start_targets(registry: Registry, workers: dict[str, Worker], directory: Path, number: int) -> None:
    config = service_config(registry, directory, tiny_target_config())
    for name in (f"target{index}" for index in range(number)):
        workers[name] = Worker(serve_as_a_job, name, config)
    until(lambda: len(serving(registry)) == number, "all targets serve", seconds=WAIT)


def serving(registry: Registry) -> list[str]:
    return [one.name for one in registry.client.living() if one.status.get("draining") is False]


def test_targets_by_name_then_a_host_are_drained_while_a_trainer_streams_and_no_batch_is_lost(
    registry: Registry, workers: dict[str, Worker], tmp_path: Path
):
    start_targets(registry, workers, tmp_path, 3)
    trainer = workers["trainer0"] = Worker(stream_until_told, "trainer0", registry.address, registry.token)
    assert trainer.receive() == "streaming"
    drained = drain(registry, "job.drain_targets=[target0,target1]")
    assert drained.returncode == 0, drained.stderr
    assert "serving on: target2" in drained.stderr and "all have left: target0, target1" in drained.stderr
    answered = [workers[name].receive() for name in ("target0", "target1")]
    assert all(set(counts) <= {"ok", "draining"} for counts in answered), answered
    assert serving(registry) == ["target2"]
    trainer.send("end")
    found, expected = trainer.receive(), expected_digests()
    assert len(found) >= NUM_BATCHES
    assert found == [expected[number % NUM_BATCHES] for number in range(len(found))]
    host = registry.client.records()[0].record.host
    last = drain(registry, f"job.drain_host={host}")
    assert last.returncode == 0 and "all have left: target2" in last.stderr, last.stderr
    workers["target2"].receive()


def test_who_is_not_there_is_named_and_a_worker_that_stays_ends_the_wait(registry: Registry):
    asked = threading.Event()
    staying = Record(
        name="target0",
        role="target",
        run="",
        id=registry.client.new_id(),
        incarnation="ab" * 8,
        url="uv://127.0.0.1:1",
        device="cpu",
        gpu="",
        host="here",
        pid=1,
        status={"draining": False},
    )
    beat = Beat(
        client=registry.client,
        record=staying,
        status=lambda: staying.status,
        interval=HEARTBEATS["heartbeat_interval"],
        patience=WAIT,
        stop=threading.Event(),
        when_superseded=lambda: None,
        when_drained=asked.set,
    )
    with beat:
        for overrides, message in (
            (
                ["job.drain_targets=[target7]"],
                "job.drain_targets must name living targets (target0), got target7",
            ),
            (
                ["job.drain_host=nowhere"],
                "job.drain_host must be a host with living targets (here), got nowhere",
            ),
            ([], "job.drain_host must be given with job=drain"),
            (["job.drain_host=here", "job.drain_within=0.5"], "gave up waiting for target0 to leave"),
        ):
            ended = drain(registry, *overrides)
            assert ended.returncode == 1 and message in ended.stderr, ended.stderr
        assert asked.wait(WAIT)
