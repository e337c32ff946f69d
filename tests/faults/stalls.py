"""`faults.py stalls`: how long a trainer waits when a target is killed, with another one at hand and without."""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from faults.campaign import Hang
from faults.checks import Check
from faults.consumer import num_times, read_times
from faults.isolation import Isolation
from faults.processes import Process, Zygote, ended_at_last, wait_until
from faults.report import Report, spread, table
from faults.service import Service, free_ports
from faults.workplace import Workplace

_LONGEST_BAR, _MEDIAN_BAR, _RESUME_BAR, _REQUEST_BAR = 1.0, 0.2, 5.0, 0.05
_CALM_SECONDS = (1.5, 3.0)  # between recovery and the next kill
_WINDOW = 2.0  # seconds around a kill in which a pause is put down to it
_AWAY_SECONDS = (0.0, 3.0)  # of a sole target before it is started anew
_TIMEOUT = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=30, help="of one of two targets")
    parser.add_argument("--restarts", type=int, default=15, help="of a sole target")
    parser.add_argument(
        "--train-seconds", type=float, default=0.02, help="that the trainer spends on each batch"
    )


@dataclass
class Stage:
    """A service, and a trainer that only takes batches."""

    service: Service
    consumer: Process
    times: str
    draw: random.Random
    request_seconds: list[float] = field(default_factory=list)  # as the trainer sees them, by target

    def __post_init__(self) -> None:
        self._file = self.service.workplace.path / self.times

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        """Raises `Hang` if it does not come true."""
        if not wait_until(holds, _TIMEOUT, self.look):
            raise Hang(f"waited {_TIMEOUT:.0f} s for {what}: ...\n{self.consumer.end_of_log()}")

    def look(self) -> None:
        self.service.revive()
        if not self.consumer.alive:
            raise RuntimeError(
                f"the trainer ended with code {self.consumer.poll()}: ...\n{self.consumer.end_of_log()}"
            )

    def flow(self) -> None:
        """Returns when all targets serve and batches have come for a while."""
        self.wait(self.serving, "all targets to serve")
        wait_until(lambda: False, self.draw.uniform(*_CALM_SECONDS), self.look)
        before = self.num_batches
        self.wait(lambda: self.num_batches > before, "a batch")
        for record in self.service.records():
            if record.role == "trainer":
                figures = [target["seconds_per_request"] for target in record.status.get("targets", [])]
                self.request_seconds += [seconds for seconds in figures if seconds]

    def serving(self) -> bool:
        return all(
            self.service.serving(part) for part in self.service.parts.values() if part.role == "target"
        )

    @property
    def num_batches(self) -> int:
        return num_times(self._file)

    def batch_times(self) -> list[float]:
        return read_times(self._file)

    def kill(self, name: str) -> float:
        """The moment of it."""
        part = self.service.parts[name]
        part.may_end = "SIGKILL"
        moment = time.monotonic()
        part.running.kill()
        wait_until(lambda: not part.running.alive, _TIMEOUT)
        return moment


@contextmanager
def stage(
    zygote: Zygote, workplace: Workplace, name: str, num_targets: int, arguments: argparse.Namespace
) -> Iterator[Stage]:
    service = Service(zygote, workplace, free_ports(1)[0], name, num_targets=num_targets)
    times = f"{name}.times"
    training = workplace.training_settings(steps=1, seed=arguments.seed)
    overrides = [
        "job=train",
        "rpc=elastic",
        *workplace.service_settings(service.port),
        *training,
        f"run.name={name}",
    ]
    consumer = zygote.fork(
        "faults.consumer:main",
        [str(workplace.path / times), str(arguments.train_seconds), *overrides],
        log=workplace.logs / f"{name}.trainer.log",
    )
    with ended_at_last(lambda: [consumer, *service.processes]):
        service.start()
        yield Stage(service, consumer, times, random.Random(arguments.seed))


def run(arguments: argparse.Namespace, zygote: Zygote, workplace: Workplace, _isolation: Isolation) -> Report:
    report = Report("Stalls")
    with stage(zygote, workplace, "pair", 2, arguments) as pair:
        kills = [stall_at_kill(pair, number) for number in range(arguments.kills)]
        calm = calm_pauses(pair)
    with stage(zygote, workplace, "sole", 1, arguments) as sole:
        resumptions = [resumption(sole, number) for number in range(arguments.restarts)]
    stalls = [one.stall for one in kills]
    requests = pair.request_seconds + sole.request_seconds
    resumed = [one.resumed for one in resumptions]
    report.checks = [
        Check(
            f"longest stall when one of two targets is killed, under {_LONGEST_BAR:g} s",
            max(stalls) < _LONGEST_BAR,
            f"{max(stalls):.3f} s",
        ),
        Check(
            f"median of these stalls, under {_MEDIAN_BAR:g} s",
            statistics.median(stalls) < _MEDIAN_BAR,
            f"{statistics.median(stalls):.3f} s",
        ),
        Check(
            f"sole target: from its readiness to the next batch, under {_RESUME_BAR:g} s",
            max(resumed) < _RESUME_BAR,
            f"{max(resumed):.2f} s",
        ),
        Check(
            f"a request takes under {1000 * _REQUEST_BAR:.0f} ms (median)",
            statistics.median(requests) < _REQUEST_BAR,
            f"{1000 * statistics.median(requests):.1f} ms",
        ),
    ]
    report.notes.append(
        f"A trainer takes batches over elastic membership, trains {1000 * arguments.train_seconds:.0f} ms on each and keeps 4 requests "
        "under way. A stall is the longest time between two batches in the two seconds after a kill, training included. Killed targets "
        f"are started anew at once, sole ones after 0 to {_AWAY_SECONDS[1]:.0f} s."
    )
    rows = [
        ("one of two targets killed", len(stalls), spread(stalls)),
        ("no kill: the longest pause of two seconds", len(calm), spread(calm)),
        ("sole target killed: readiness to next batch", len(resumed), spread(resumed)),
        ("sole target killed: kill to next batch", len(resumed), spread([one.outage for one in resumptions])),
    ]
    report.tables.append(table(("what", "number", "s (median, longest)"), rows))
    report.record = {
        "kills": [asdict(one) for one in kills],
        "resumptions": [asdict(one) for one in resumptions],
        "calm": calm,
    }
    return report


@dataclass(frozen=True)
class Kill:
    """Of one of two targets. Seconds."""

    victim: str
    stall: float


def stall_at_kill(scene: Stage, number: int) -> Kill:
    scene.flow()
    victim = f"target{scene.draw.randrange(2)}"
    moment = scene.kill(victim)
    wait_until(lambda: False, _WINDOW, scene.look)
    scene.wait(lambda: scene.batch_times()[-1] > moment + _WINDOW, f"a batch after the kill of {victim}")
    stall = longest_pause(scene.batch_times(), moment, moment + _WINDOW)
    print(f"kill {number + 1} of {victim}: stall {stall:.3f} s", flush=True)
    return Kill(victim, stall)


def longest_pause(times: list[float], first: float, last: float) -> float:
    """Between two batches of which the later one came after `first` and the earlier one before `last`."""
    return max(
        later - earlier for earlier, later in itertools.pairwise(times) if later >= first and earlier <= last
    )


def calm_pauses(scene: Stage) -> list[float]:
    """The longest pause of each of ten windows without any kill."""
    pauses = []
    for _ in range(10):
        scene.flow()
        moment = time.monotonic()
        wait_until(lambda: False, _WINDOW + 0.5, scene.look)
        pauses.append(longest_pause(scene.batch_times(), moment, moment + _WINDOW))
    return pauses


@dataclass(frozen=True)
class Resumption:
    """After a sole target's death. Seconds."""

    outage: float  # from the kill to the next batch
    resumed: float  # from the new target's readiness, as the registry tells it, to the next batch


def resumption(scene: Stage, number: int) -> Resumption:
    scene.flow()
    moment = scene.kill("target0")
    # What was under way may still arrive.
    wait_until(lambda: False, scene.draw.uniform(*_AWAY_SECONDS))
    before = scene.num_batches
    scene.service.revive()
    scene.wait(scene.serving, "the new target to serve")
    ready = time.monotonic()
    scene.wait(lambda: scene.num_batches > before, "a batch from the new target")
    first = scene.batch_times()[before]
    found = Resumption(outage=first - moment, resumed=max(0.0, first - ready))
    print(
        f"restart {number + 1}: {found.resumed:.3f} s from readiness to the next batch, outage {found.outage:.2f} s",
        flush=True,
    )
    return found
