"""Targets and trainers that come, die and return, as processes of their own over real RPC."""

import contextlib
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.elastic import (
    WAIT,
    Link,
    Registry,
    Worker,
    joined,
    remote_target,
    serve_target,
    serve_tiny_target,
)
from support.tiny_target import TINY_LLAMA, tensors_of, tiny_batch, tiny_mapping, tiny_target_config
from support.waiting import until

from eagle_rpc.errors import StaleIncarnation
from eagle_rpc.registry import Record
from eagle_rpc.supervision import SessionSettings
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

pytestmark = pytest.mark.rpc


class Service:
    """Workers of one registry, ended with the test."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._workers: list[Worker] = []

    def start(self, function: Any, *args: Any) -> Worker:
        self._workers.append(Worker(function, *args, self.registry.address, self.registry.token))
        return self._workers[-1]

    def target(self, name: str) -> tuple[Worker, str]:
        """A target that serves, and its incarnation."""
        worker = self.start(serve_tiny_target, name)
        return worker, worker.receive()

    def end(self) -> None:
        for worker in self._workers:
            worker.end()


@pytest.fixture
def service(registry: Registry) -> Iterator[Service]:
    made = Service(registry)
    yield made
    made.end()


def digests(batch: Any) -> dict[str, list[Any]]:
    # Compared bit for bit: fp32 survives the way through Python floats.
    return {name: tensor.tolist() for name, tensor in tensors_of(batch).items()}


def expected_batch(seed: int) -> dict[str, list[Any]]:
    target = HFEagle3TargetModel.load(tiny_target_config(), "cpu", cache_dir="unused", seed=0)
    backend = ColocatedEagle3TargetModel(
        target, tiny_target_config(), SessionSettings(encoding="hidden", rows="position_mask")
    )
    backend.open_session(tiny_mapping())
    tokens = tiny_batch(seed)
    return digests(backend.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask))


def stream_on_demand(link: Link, name: str, address: str, token: bytes) -> None:
    """A trainer that streams; sends one batch and what it thinks of its targets each time that the test asks
    for one.
    """
    with remote_target(name, address, token) as backend:
        backend.open_session(tiny_mapping())
        for batch in backend.stream(tiny_batch(seed) for seed in range(1000)):
            if link.receive() == "end":
                return
            link.send((digests(batch), backend.status()))


def check_batches(trainer: Worker, seeds: range) -> dict[str, Any]:
    """The batches of `seeds` must come in order and right to the bit. Returns the trainer's view of its
    targets then.
    """
    for seed in seeds:
        trainer.send("next")
        batch, status = trainer.receive()
        assert batch == expected_batch(seed), seed
    return status


def check_until(
    trainer: Worker, start: int, holds: Callable[[dict[str, Any]], bool], *, at_least: int = 1
) -> None:
    """Checks batch after batch from `start` on, `at_least` so many, until the trainer's view is right."""
    status = check_batches(trainer, range(start, start + at_least))
    for seed in range(start + at_least, 1000):
        if holds(status):
            return
        status = check_batches(trainer, range(seed, seed + 1))
    raise AssertionError("the trainer's view of its targets never became right")


def names(status: dict[str, Any]) -> list[str]:
    return sorted(target["name"] for target in status["targets"])


def test_a_target_that_is_killed_leaves_its_requests_to_the_other_one(service: Service):
    first, _ = service.target("target0")
    service.target("target1")
    trainer = service.start(stream_on_demand, "trainer0")
    check_batches(trainer, range(3))
    first.process.kill()
    check_until(trainer, 3, lambda status: names(status) == ["target1"], at_least=9)


def test_a_sole_target_returns_under_another_incarnation_and_training_goes_on(service: Service):
    target, first = service.target("target0")
    trainer = service.start(stream_on_demand, "trainer0")
    assert check_batches(trainer, range(3))["targets"][0]["incarnation"] == first
    target.process.kill()
    _, second = service.target("target0")
    assert check_batches(trainer, range(3, 12))["targets"][0]["incarnation"] == second != first


def test_trainers_of_other_processes_come_and_are_killed_while_one_goes_on(service: Service):
    service.target("target0")
    steady = service.start(stream_on_demand, "trainer0")
    check_batches(steady, range(2))
    for number in range(2):
        guest = service.start(stream_on_demand, f"guest{number}")
        check_batches(guest, range(2))
        guest.process.kill()
        check_batches(steady, range(2 + 3 * number, 5 + 3 * number))


def test_a_target_that_is_stopped_is_passed_over_and_used_again(service: Service):
    stopped, _ = service.target("target0")
    service.target("target1")
    trainer = service.start(stream_on_demand, "trainer0")
    check_batches(trainer, range(3))
    os.kill(stopped.process.pid, signal.SIGSTOP)
    check_batches(trainer, range(3, 10))
    os.kill(stopped.process.pid, signal.SIGCONT)
    check_until(
        trainer, 10, lambda status: [one["state"] for one in status["targets"]] == ["serving", "serving"]
    )


def test_the_registry_may_die_and_return_while_supervision_flows(service: Service, registry: Registry):
    service.target("target0")
    trainer = service.start(stream_on_demand, "trainer0")
    check_batches(trainer, range(2))
    registry.end()
    check_batches(trainer, range(2, 6))
    registry.restart()
    service.target("target1")
    check_until(trainer, 6, lambda status: names(status) == ["target0", "target1"])


def stream_through_cuts(link: Link, name: str, address: str, token: bytes) -> None:
    """A trainer that cuts its own connections to the target when it is told to."""
    with remote_target(name, address, token) as backend:
        backend.open_session(tiny_mapping())
        for batch in backend.stream(tiny_batch(seed) for seed in range(1000)):
            order = link.receive()
            if order == "end":
                return
            if order == "cut":
                cut_connections(int(address.rpartition(":")[2]))
            link.send((digests(batch), backend.status()))


def cut_connections(registry_port: int) -> None:
    """Shuts every connected TCP socket of this process down, but those to the registry."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as connection:
                if connection.family == socket.AF_INET and connection.getpeername()[1] != registry_port:
                    connection.shutdown(socket.SHUT_RDWR)


def test_connections_that_are_cut_are_made_anew_with_the_same_incarnation(service: Service):
    _, incarnation = service.target("target0")
    trainer = service.start(stream_through_cuts, "trainer0")
    check_batches(trainer, range(2))
    for number in range(2, 10, 4):
        trainer.send("cut")
        batch, _ = trainer.receive()
        assert batch == expected_batch(number)
        status = check_batches(trainer, range(number + 1, number + 4))
    assert [one["incarnation"] for one in status["targets"]] == [incarnation]
    assert status["failovers"] > 0


def meet_an_impostor(link: Link, name: str, address: str, token: bytes) -> None:
    with joined(name, "trainer", address, token) as membership:
        link.send("joined")
        link.receive()
        impostor = next(one for one in membership.targets() if one.name == "target9")
        try:
            membership.connect(impostor)
        except StaleIncarnation as error:
            link.send(str(error))


def test_another_process_at_a_known_address_is_found_out_on_the_first_call(
    service: Service, registry: Registry
):
    _, incarnation = service.target("target0")
    trainer = service.start(meet_an_impostor, "trainer0")
    assert trainer.receive() == "joined"
    real = until_serving(registry)
    fields = {name: getattr(real, name) for name in Record.__dataclass_fields__}
    registry.client.announce(Record(**{**fields, "name": "target9", "incarnation": "0" * 32}))
    trainer.send("announced")
    seen = trainer.receive()
    assert seen.startswith("target9 must be incarnation 000000") and incarnation in seen


def be_scanned(link: Link, name: str, address: str, token: bytes) -> None:
    with joined(name, "target", address, token) as membership:
        link.send((membership.me.url, membership.reachable))
        link.receive()
        until(lambda: not membership.reachable, "a scan makes the worker unreachable", seconds=WAIT)
        link.send(membership.reachable)


def test_a_worker_whose_port_torch_gives_up_after_a_scan_knows_it(service: Service):
    worker = service.start(be_scanned, "target0")
    url, reachable = worker.receive()
    assert reachable
    host, _, port = url.removeprefix("uv://").rpartition(":")
    socket.create_connection((host, int(port))).close()
    worker.send("scanned")
    assert worker.receive() is False


NUM_CONTROL_CALLS = 20


def beat_beside_bulk(link: Link, name: str, address: str, token: bytes) -> None:
    """Sends how many large replies arrived while control calls were answered one after the other, and the
    replies' size.
    """
    with joined(name, "trainer", address, token) as membership:
        (target,) = membership.targets()
        connection = membership.connect(target)
        size = connection.call("input_embeddings", what="much", timeout=WAIT).result().nbytes
        in_flight: list[Any] = []
        num_arrived = 0
        for _ in range(NUM_CONTROL_CALLS):
            in_flight += [
                connection.call("input_embeddings", what="much", timeout=WAIT)
                for _ in range(4 - len(in_flight))
            ]
            connection.control("model_info", timeout=WAIT).result()
            num_arrived += sum(call.done for call in in_flight)
            in_flight = [call for call in in_flight if not call.done]
        for call in in_flight:
            call.result()
        link.send((num_arrived, size))


def test_control_calls_do_not_wait_behind_tensors(service: Service, registry: Registry):
    wide = tiny_target_config(
        random={**TINY_LLAMA, "vocab_size": 200_000, "hidden_size": 256, "tie_word_embeddings": True}
    )
    service.start(serve_target, "target0", wide).receive()
    until_serving(registry)
    num_arrived, num_bytes = service.start(beat_beside_bulk, "trainer0").receive()
    assert num_bytes == 200_000 * 256 * 4
    # Behind tensors each control call would wait for all four replies in flight; on its own connection, for
    # none.
    assert num_arrived < 2 * NUM_CONTROL_CALLS


def num_sockets(pid: int) -> int:
    return sum(link.startswith("socket:") for link in open_files(pid))


def open_files(pid: int) -> Iterator[str]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(entry)


def until_serving(registry: Registry) -> Record:
    """The record of a target once it says that it serves."""

    def serving() -> list[Record]:
        return [one for one in registry.client.living() if one.status.get("draining") is False]

    return until(serving, "a target serves", seconds=WAIT)[0]


def test_trainers_that_were_killed_leave_no_open_sockets_at_the_target(service: Service, registry: Registry):
    target, _ = service.target("target0")
    pid, most = target.process.pid, 0
    for number in range(5):
        guest = service.start(stream_on_demand, f"guest{number}")
        check_batches(guest, range(2))
        if number < 2:
            most = num_sockets(pid)
        else:
            # Each beat at the registry opens a socket for a moment, and the target closes a dead guest's
            # sockets later.
            few = f"the target has {most} sockets at most"
            until(
                lambda most=most: num_sockets(pid) <= most,
                few,
                seconds=WAIT,
                seen=lambda: f"{num_sockets(pid)} sockets",
            )
        guest.process.kill()
        until(lambda: len(registry.client.living()) == 1, "the registry forgets the dead guest", seconds=WAIT)
