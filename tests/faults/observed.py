"""A service with a trainer that only takes batches and writes their times, so that every pause is known exactly."""

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from support.processes import Process, ended_at_last, free_port
from support.waiting import happens, pause

from faults.campaign import Hang
from faults.checks import Check
from faults.consumer import num_times, read_times
from faults.service import Service
from faults.workspace import Workspace
from faults.zygote import Zygote

# Seconds: of a pause when one of several targets ends, at most and in the median.
LONGEST, MEDIAN = 1.0, 0.2
WINDOW = 2.0  # seconds after an event in which a pause counts as its consequence
TIMEOUT = 60.0
_CALM_SECONDS = (1.5, 3.0)  # between recovery and the next event


@dataclass
class Observed:
    """A service, and a trainer that only takes batches."""

    service: Service
    consumer: Process
    times: str
    draw: random.Random
    request_seconds: list[float] = field(default_factory=list)  # as the trainer measures them, by target

    def __post_init__(self) -> None:
        self._file = self.service.workspace.path / self.times

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        """Raises `Hang` after a minute."""
        if not happens(holds, within=TIMEOUT, meanwhile=self.look):
            raise Hang(f"waited {TIMEOUT:.0f} s for {what}: ...\n{self.consumer.end_of_log()}")

    def look(self) -> None:
        """Starts ended targets anew. Raises `RuntimeError` if the trainer has ended."""
        self.service.revive()
        if not self.consumer.alive:
            code, log = self.consumer.poll(), self.consumer.end_of_log()
            raise RuntimeError(f"the trainer ended with code {code}: ...\n{log}")

    def recover(self) -> None:
        """Returns when all targets serve and batches have arrived for a while."""
        self.wait(self.serving, "all targets to serve")
        pause(self.draw.uniform(*_CALM_SECONDS), self.look)
        before = self.num_batches
        self.wait(lambda: self.num_batches > before, "a batch")
        for record in self.service.records():
            if record.role == "trainer":
                figures = [target["seconds_per_request"] for target in record.status.get("targets", [])]
                self.request_seconds += [seconds for seconds in figures if seconds]

    def serving(self) -> bool:
        return all(self.service.serving(target) for target in self.service.targets)

    @property
    def num_batches(self) -> int:
        return num_times(self._file)

    def batch_times(self) -> list[float]:
        return read_times(self._file)

    def kill(self, name: str) -> float:
        """The time of the kill."""
        worker = self.service.workers[name]
        worker.may_end = "SIGKILL"
        moment = time.monotonic()
        worker.running.kill()
        worker.running.ends(TIMEOUT)
        return moment


@contextmanager
def observed(
    zygote: Zygote, workspace: Workspace, name: str, num_targets: int, arguments: argparse.Namespace
) -> Iterator[Observed]:
    service = Service(zygote, workspace, free_port(), name, num_targets=num_targets)
    settings = workspace.service_settings(service.address) + workspace.training_settings(
        steps=1, seed=arguments.seed
    )
    times = f"{name}.times"
    consumer = zygote.fork(
        "faults.consumer:main",
        [str(workspace.path / times), str(arguments.train_seconds), *settings],
        log=workspace.logs / f"{name}.trainer.log",
    )
    with ended_at_last(lambda: [consumer, *service.processes]):
        service.start()
        yield Observed(service, consumer, times, random.Random(arguments.seed))


def longest_pause(times: list[float], first: float, last: float) -> float:
    """The longest time between two successive batches that overlaps `first` to `last`."""
    pauses = [
        (earlier, later) for earlier, later in itertools.pairwise(times) if later >= first and earlier <= last
    ]
    return max(later - earlier for earlier, later in pauses)


def below(bound: float, name: str, seconds: float) -> Check:
    return Check(f"{name}, under {bound:g} s", seconds < bound, f"{seconds:.3f} s", is_figure=True)
