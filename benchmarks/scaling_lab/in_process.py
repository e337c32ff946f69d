"""Targets and trainers as threads of one process: real client, dispatcher, server, scheduler and registry.

Only the transport below `Link` is replaced: a thread of the target runs its endpoint, as one of RPC would.
"""

import contextlib
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.futures import Future

from eagle_rpc.errors import ConnectionLost
from eagle_rpc.registry import Record, RegistryClient
from eagle_rpc.registry.beat import Beat
from eagle_rpc.rpc import ServiceCall, TargetAddress
from eagle_rpc.service.endpoint import TargetEndpoint
from eagle_rpc.service.server import TargetModelServer
from scaling_lab.scenario import Scenario, StandInTarget, target_config

_PATIENCE = 60.0


def record(name: str, role: str, worker_id: int) -> Record:
    return Record(
        name=name,
        role=role,
        run="" if role == "target" else "scaling",
        id=worker_id,
        incarnation=secrets.token_hex(16),
        url="uv://127.0.0.1:12345",
        device="cpu",
        gpu="",
        host=socket.gethostname(),
        pid=1,
        status={},
    )


def announced(
    registry: RegistryClient, entry: Record, status: Any, scenario: Scenario, stop: threading.Event
) -> Beat:
    return Beat(
        client=registry,
        record=entry,
        status=status,
        interval=scenario.heartbeat_interval,
        patience=_PATIENCE,
        stop=stop,
        when_superseded=lambda: None,
        when_drained=lambda: None,
    )


class InProcessTarget:
    """A target that can be killed: calls under way end as torch ends those of a dead process."""

    def __init__(self, scenario: Scenario, index: int, registry: RegistryClient, worker_id: int) -> None:
        self.name = f"target{index}"
        self.stand_in = StandInTarget(scenario, index)
        self.record = record(self.name, "target", worker_id)
        incarnation = self.record.incarnation
        self.server = TargetModelServer(self.stand_in, target_config(scenario), incarnation=incarnation)
        self.stand_in.num_queued = lambda: self.server._scheduler.num_queued
        self._endpoint = TargetEndpoint(self.server)
        self._lock = threading.Lock()
        self._under_way: set[Future[Any]] = set()
        self.alive = True
        self._stop = threading.Event()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._handle, name="handler", daemon=True).start()
        self._beat = announced(registry, self.record, self.server.status, scenario, self._stop)
        self._beat.__enter__()

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if not self.alive:
                future.set_exception(_broken())
                return future
            self._under_way.add(future)

        def run() -> None:
            reply = getattr(self._endpoint, method)(*arguments)
            reply.add_done_callback(lambda done: self._complete(future, done.value()))

        self._calls.put(run)
        return future

    def _handle(self) -> None:
        while (run := self._calls.get()) is not None:
            run()

    def _complete(self, future: Future[Any], value: Any) -> None:
        with self._lock:
            if future not in self._under_way:
                return
            self._under_way.discard(future)
        future.set_result(value)

    def die(self) -> None:
        with self._lock:
            self.alive = False
            lost, self._under_way = self._under_way, set()
        for future in lost:
            future.set_exception(_broken())
        self.close()

    def close(self) -> None:
        self._beat.close()
        self.server.close()
        self._calls.put(None)


def _broken() -> RuntimeError:
    return RuntimeError("eof (this error originated at tensorpipe/in_process)")


class InProcessLink:
    """As `eagle_rpc.rpc.Link`, without transport."""

    between_gpus = False

    def __init__(self, target: InProcessTarget) -> None:
        self.peer, self.incarnation = target.name, target.record.incarnation
        self._target = target

    def call(self, method: str, *arguments: Any, what: str, timeout: float) -> ServiceCall:
        future = self._target.call(method, *arguments)
        return ServiceCall(future, peer=self.peer, what=what, timeout=timeout)

    def control(self, method: str, *arguments: Any, timeout: float) -> ServiceCall:
        return self.call(method, *arguments, what=method, timeout=timeout)


class InProcessMembership:
    """A trainer's view of the registry, as `ElasticMembership` has it."""

    elastic = True

    def __init__(self, registry: RegistryClient, targets: dict[str, InProcessTarget]) -> None:
        self._registry, self._targets = registry, targets  # targets by incarnation, shared by all

    def targets(self) -> list[TargetAddress]:
        return [
            TargetAddress(name=one.name, incarnation=one.incarnation, record=one)
            for one in self._registry.living()
            if one.role == "target" and one.status.get("draining") is False
        ]

    def connect(self, address: TargetAddress) -> InProcessLink:
        target = self._targets.get(address.incarnation)
        if target is None or not target.alive:
            raise ConnectionLost(f"{address.name} is gone")
        return InProcessLink(target)

    def leave(self, link: InProcessLink, *, lost: bool) -> None:
        """There is no connection to close."""


@contextlib.contextmanager
def killing(scenario: Scenario, targets: list[InProcessTarget], make: Any, draw: Any) -> Iterator[list[str]]:
    """Kills targets at the scenario's rate, each for its outage, while the body runs; yields their names."""
    killed: list[str] = []
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(draw.expovariate(scenario.failures)):
            index = draw.randrange(len(targets))
            killed.append(targets[index].name)
            targets[index].die()
            if ended.wait(scenario.outage):
                return
            targets[index] = make(index)

    thread = threading.Thread(target=kill, daemon=True)
    if scenario.failures:
        thread.start()
    try:
        yield killed
    finally:
        ended.set()
        if scenario.failures:
            thread.join()
