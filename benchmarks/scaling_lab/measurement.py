"""Runs a scenario in this process and takes its figures. Costs are processor time, which other processes of a
busy machine do not change; a pass is a sleep, so the rate counts as long as the processors are not full.
"""

import contextlib
import itertools
import multiprocessing
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from eagle_rpc.client import ClientSettings, RemoteEagle3TargetModel
from eagle_rpc.registry import Directory, IdFile, RegistryClient, RegistryServer
from eagle_rpc.supervision import SessionSettings, TargetExpectation
from scaling_lab.in_process import InProcessMembership, InProcessTarget, announced, killing, record
from scaling_lab.scenario import Scenario, mapping, tokens_of

TOKEN = b"scaling" * 5
_WAIT = 600.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of the measured seconds. Costs in milliseconds of processor time."""

    efficiency: (
        float  # of targets: share of the time with a request to work on, less their own cost a request
    )
    by_clock: float  # batches by the clock over those of an ideal service: less on a busy machine
    batches: int
    lost: int  # batches of a trainer that did not come, in all of the run
    kills: int
    uneven: float  # largest deviation of a target's busy time from the mean, over the mean
    dispatcher: float  # a request
    server: float  # a request: handler and forward thread, without the pass
    dispatcher_share: float  # of one processor, of one trainer: what heartbeats and looks cost
    client_other: float  # a request: look-ups, attaching and the trainer's own thread
    registry_share: float  # of one processor
    processors: float  # used by this process and the registry together
    trainer_kib: float  # resident memory beside the targets'
    sessions: int  # at one target, most


def serve_registry(connection: Any, directory: str, ttl: float) -> None:
    """A process: a registry until the other end says something."""
    server = RegistryServer(("127.0.0.1", 0), TOKEN, Directory(IdFile(Path(directory) / "ids"), ttl=ttl))
    connection.send(server.address)
    connection.recv()


class Trainer:
    """A thread that takes batches and sleeps for the time of a step."""

    def __init__(
        self, index: int, scenario: Scenario, membership: InProcessMembership, registry: RegistryClient
    ) -> None:
        self._scenario = scenario
        self._stop, self.ending = threading.Event(), threading.Event()
        name = f"trainer{index}"
        self.batches = self.asked = 0
        settings = ClientSettings(
            session=SessionSettings(encoding="logits", rows="loss_mask", run="scaling", trainer=name),
            index=index,
            prefetch=scenario.prefetch,
            request_timeout=_WAIT,
            reconnect_deadline=_WAIT,
            heartbeat_interval=scenario.heartbeat_interval,
            heartbeat_misses=10,
            most_targets=scenario.neighbours,
        )
        self.backend = RemoteEagle3TargetModel(
            membership,
            settings=settings,
            expected=TargetExpectation(),
            device=torch.device("cpu"),
            stop=self._stop,
        )
        self.backend.open_session(mapping())
        entry = record(name, "trainer", 10_000 + index)
        self._beat = announced(registry, entry, self.backend.status, scenario, self._stop)
        self._beat.__enter__()
        self.thread = threading.Thread(target=self._train, name="trainer", daemon=True)

    def _train(self) -> None:
        tokens = tokens_of(self._scenario)

        def source() -> Any:
            while not self.ending.is_set():
                self.asked += 1
                yield tokens

        for _ in self.backend.stream(source()):
            self.batches += 1
            if not self.ending.is_set():
                time.sleep(self._scenario.train)

    def close(self) -> None:
        self._beat.close()
        self.backend.close()


def thread_seconds() -> Counter[str]:
    """Processor seconds of this process's threads by name."""
    used: Counter[str] = Counter()
    for thread in threading.enumerate():
        with contextlib.suppress(OSError):
            assert thread.ident is not None
            used[thread.name.partition(" ")[0]] += time.clock_gettime(
                time.pthread_getcpuclockid(thread.ident)
            )
    return used


def measure(scenario: Scenario, directory: str, *, warm_up: float) -> Figures:
    """Starts everything, waits `warm_up` seconds, measures and ends everything."""
    ours, theirs = multiprocessing.Pipe()
    ttl = 20 * scenario.heartbeat_interval
    host = multiprocessing.get_context("fork").Process(
        target=serve_registry, args=(theirs, directory, ttl), daemon=True
    )
    host.start()
    with contextlib.closing(ours):
        registry = RegistryClient(ours.recv(), TOKEN, timeout=30.0)
        try:
            return _measure(scenario, registry, psutil.Process(host.pid), warm_up)
        finally:
            ours.send("end")
            host.join()


def _measure(scenario: Scenario, registry: RegistryClient, host: psutil.Process, warm_up: float) -> Figures:
    ids = itertools.count(1)
    known: dict[str, InProcessTarget] = {}

    def make(index: int) -> InProcessTarget:
        target = InProcessTarget(scenario, index, registry, next(ids))
        known[target.record.incarnation] = target
        return target

    targets = [make(index) for index in range(scenario.targets)]
    me = psutil.Process()
    before = me.memory_info().rss
    trainers = [
        Trainer(index, scenario, InProcessMembership(registry, known), registry)
        for index in range(scenario.trainers)
    ]
    for trainer in trainers:
        trainer.thread.start()
    draw = random.Random(1)
    with killing(scenario, targets, make, draw) as killed:
        time.sleep(warm_up)
        started = _Snapshot(trainers, known, me, host)
        time.sleep(scenario.seconds)
        ended = _Snapshot(trainers, known, me, host)
        memory = me.memory_info().rss - before
        sessions = max(len(list(one.server.sessions)) for one in targets)
    for trainer in trainers:
        trainer.ending.set()
    for trainer in trainers:
        trainer.thread.join(_WAIT)
        trainer.close()
    for target in targets:
        target.close()
    lost = sum(one.asked - one.batches for one in trainers)
    kib = memory / 1024 / scenario.trainers
    return _figures(scenario, started, ended, lost=lost, kills=len(killed), kib=kib, sessions=sessions)


class _Snapshot:
    def __init__(
        self,
        trainers: list[Trainer],
        known: dict[str, InProcessTarget],
        me: psutil.Process,
        host: psutil.Process,
    ) -> None:
        self.at = time.monotonic()
        self.batches = sum(one.batches for one in trainers)
        self.threads = thread_seconds()
        self.me, self.host = (sum(one.cpu_times()[:2]) for one in (me, host))
        self.busy: Counter[str] = Counter()
        for one in list(known.values()):
            self.busy[one.name] += one.stand_in.seconds_computed
        self.starved = sum(one.stand_in.seconds_starved for one in known.values())


def _figures(
    scenario: Scenario, start: _Snapshot, end: _Snapshot, *, lost: int, kills: int, kib: float, sessions: int
) -> Figures:
    seconds, batches = end.at - start.at, max(1, end.batches - start.batches)
    ideal = seconds * scenario.targets / scenario.forward * min(1.0, scenario.load)
    busy = [end.busy[name] - start.busy[name] for name in end.busy]
    mean = max(sum(busy) / len(busy), 1e-9)

    def cost(*names: str) -> float:
        return 1e3 * sum(end.threads[name] - start.threads[name] for name in names) / batches

    server = cost("forward", "handler")
    fed = 1 - (end.starved - start.starved) / (seconds * scenario.targets)
    return Figures(
        efficiency=fed * scenario.forward / (scenario.forward + server / 1e3),
        by_clock=batches / ideal,
        batches=batches,
        lost=lost,
        kills=kills,
        uneven=max(abs(one - mean) for one in busy) / mean,
        dispatcher=cost("dispatch"),
        server=server,
        dispatcher_share=cost("dispatch") * batches / 1e3 / seconds / scenario.trainers,
        client_other=cost("fleet", "attach", "trainer", "beat"),
        registry_share=(end.host - start.host) / seconds,
        processors=(end.me - start.me + end.host - start.host) / seconds,
        trainer_kib=kib,
        sessions=sessions,
    )
