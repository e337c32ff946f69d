"""`stalls`: the trainer's wait after a kill of a target, with a second target and without."""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from support.processes import Process, ended_at_last, free_port
from support.reporting import table
from support.waiting import happens, pause

from faults.campaign import Hang
from faults.checks import Check
from faults.consumer import num_times, read_times
from faults.isolation import Isolation
from faults.report import Report, spread
from faults.service import Service
from faults.workspace import Workspace
from faults.zygote import Zygote

# Bounds of the checks, in seconds.
_LONGEST, _MEDIAN, _RESUMPTION, _REQUEST = 1.0, 0.2, 5.0, 0.05
_CALM_SECONDS = (1.5, 3.0)  # between recovery and the next kill
_WINDOW = 2.0  # seconds after a kill in which a pause counts as its consequence
_AWAY_SECONDS = (0.0, 3.0)  # between the end of a sole target and its next start
_NUM_CALM_WINDOWS = 10
_TIMEOUT = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=30, help="of one of two targets")
    parser.add_argument("--restarts", type=int, default=15, help="of a sole target")
    parser.add_argument("--train-seconds", type=float, default=0.02, help="of the trainer for each batch")


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
        if not happens(holds, within=_TIMEOUT, meanwhile=self.look):
            raise Hang(f"waited {_TIMEOUT:.0f} s for {what}: ...\n{self.consumer.end_of_log()}")

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
        worker.running.ends(_TIMEOUT)
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


def run(arguments: argparse.Namespace, zygote: Zygote, workspace: Workspace, _isolation: Isolation) -> Report:
    with observed(zygote, workspace, "pair", 2, arguments) as pair:
        kills = [stall_at_kill(pair, number) for number in range(arguments.kills)]
        calm = calm_pauses(pair)
    with observed(zygote, workspace, "sole", 1, arguments) as sole:
        resumptions = [resumption(sole, number) for number in range(arguments.restarts)]
    stalls, resumed = [one.stall for one in kills], [one.resumed for one in resumptions]
    requests = pair.request_seconds + sole.request_seconds
    note = (
        f"A trainer takes batches over elastic membership, trains {1000 * arguments.train_seconds:.0f} ms "
        "on each and has 4 requests under way. A stall is the longest time between two batches in the two "
        "seconds after a kill, training included. One of two killed targets is started anew at once, a sole one after "
        f"{_AWAY_SECONDS[0]:.0f} to {_AWAY_SECONDS[1]:.0f} s."
    )
    rows = [
        ("one of two targets killed", len(stalls), spread(stalls)),
        ("no kill: the longest pause of two seconds", len(calm), spread(calm)),
        ("sole target killed: from readiness to the next batch", len(resumed), spread(resumed)),
        ("sole target killed: kill to next batch", len(resumed), spread([one.outage for one in resumptions])),
    ]
    return Report(
        "Stalls",
        notes=[note],
        tables=[table(("case", "number", "s (median, longest)"), rows)],
        checks=[
            below(_LONGEST, "longest stall when one of two targets is killed", max(stalls)),
            below(_MEDIAN, "median of these stalls", statistics.median(stalls)),
            below(_RESUMPTION, "sole target: from its readiness to the next batch", max(resumed)),
            below(_REQUEST, "median time of a request", statistics.median(requests)),
        ],
        record={
            "kills": [asdict(one) for one in kills],
            "resumptions": [asdict(one) for one in resumptions],
            "calm": calm,
        },
    )


def below(bound: float, name: str, seconds: float) -> Check:
    return Check(f"{name}, under {bound:g} s", seconds < bound, f"{seconds:.3f} s", is_figure=True)


@dataclass(frozen=True)
class Kill:
    """A kill of one of two targets. Seconds."""

    victim: str
    stall: float


def stall_at_kill(pair: Observed, number: int) -> Kill:
    pair.recover()
    victim = f"target{pair.draw.randrange(2)}"
    moment = pair.kill(victim)
    pause(_WINDOW, pair.look)
    pair.wait(lambda: pair.batch_times()[-1] > moment + _WINDOW, f"a batch after the kill of {victim}")
    stall = longest_pause(pair.batch_times(), moment, moment + _WINDOW)
    print(f"kill {number + 1} of {victim}: stall {stall:.3f} s", flush=True)
    return Kill(victim, stall)


def longest_pause(times: list[float], first: float, last: float) -> float:
    """The longest time between two successive batches that overlaps `first` to `last`."""
    pauses = [
        (earlier, later) for earlier, later in itertools.pairwise(times) if later >= first and earlier <= last
    ]
    return max(later - earlier for earlier, later in pauses)


def calm_pauses(pair: Observed) -> list[float]:
    """The longest pause of each of ten windows without a kill."""
    pauses = []
    for _ in range(_NUM_CALM_WINDOWS):
        pair.recover()
        moment = time.monotonic()
        pause(_WINDOW + 0.5, pair.look)
        pauses.append(longest_pause(pair.batch_times(), moment, moment + _WINDOW))
    return pauses


@dataclass(frozen=True)
class Resumption:
    """The end and the next start of a sole target. Seconds."""

    outage: float  # from the kill to the next batch
    resumed: float  # from the new target's record in the registry to the next batch


def resumption(sole: Observed, number: int) -> Resumption:
    sole.recover()
    moment = sole.kill("target0")
    # Replies that were under way may still arrive.
    pause(sole.draw.uniform(*_AWAY_SECONDS))
    before = sole.num_batches
    sole.service.revive()
    sole.wait(sole.serving, "the new target to serve")
    ready = time.monotonic()
    sole.wait(lambda: sole.num_batches > before, "a batch from the new target")
    first = sole.batch_times()[before]
    found = Resumption(outage=first - moment, resumed=max(0.0, first - ready))
    print(
        f"restart {number + 1}: {found.resumed:.3f} s from readiness to the next batch, outage {found.outage:.2f} s",
        flush=True,
    )
    return found
