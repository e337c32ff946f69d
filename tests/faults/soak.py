"""`soak`: targets and trainers come, go and are killed for hours; those that stay must not grow."""

import argparse
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from support.processes import Process, ended_at_last
from support.reporting import table
from support.waiting import happens

from faults.campaign import Hang, take_down
from faults.checks import Check, Surroundings
from faults.isolation import Isolation
from faults.observed import LONGEST, MEDIAN, TIMEOUT, WINDOW, Observed, below, longest_pause, observed
from faults.report import Report, mebibytes
from faults.service import REGISTRY
from faults.workspace import Workspace
from faults.zygote import Zygote

STEADY_TARGET, STEADY_TRAINER = "target0", "steady trainer"
# Shares of the time: the level after warm-up, and the level at the end.
_EARLY, _LATE = (0.2, 0.35), (0.85, 1.0)
_MEMORY_GROWTH = 0.05
# Guests and targets that are there at the moment have descriptors and threads of their own at the others.
_MORE_DESCRIPTORS, _MORE_THREADS = 4, 2
_SAMPLE_SECONDS = 1.0
_MOST_GUESTS = 2
_AWAY_SECONDS = (0.0, 10.0)  # between the end of a target and its next start
_PAUSE_STEP = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--targets", type=int, default=3, help="the first one is never ended")
    parser.add_argument("--pause", type=float, default=5.0, help="mean seconds between two events")
    parser.add_argument("--guest-steps", type=int, default=60, help="optimiser steps of a trainer that comes")
    parser.add_argument(
        "--train-seconds", type=float, default=0.1, help="of the steady trainer for each batch"
    )


class Sample(NamedTuple):
    """Of one process: memory in bytes, numbers of descriptors and threads."""

    at: float  # time.monotonic
    resident: int
    anonymous: int
    descriptors: int
    threads: int


@dataclass
class Guest:
    """A trainer that comes and goes."""

    process: Process
    metrics: Path
    codes: tuple[int, ...] = (0,)  # with which it may end

    @property
    def trains(self) -> bool:
        """Whether it has begun; before that, a signal ends it as any program."""
        return self.process.alive and self.metrics.exists()

    @property
    def has_finished(self) -> bool:
        """Whether its last line is there; after that as well."""
        return "/report.html" in self.process.end_of_log(1)


@dataclass
class Soak:
    """A service with churn. `stays` are the processes that must not grow."""

    stage: Observed
    arguments: argparse.Namespace
    stays: dict[str, Process]
    draw: random.Random
    guests: list[Guest] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    stalls: list[float] = field(default_factory=list)  # in the seconds after a target's end
    wrong: list[str] = field(default_factory=list)
    _num_guests: int = 0

    def run(self, minutes: float) -> None:
        """One event after the other. Raises `Hang` if targets do not come back or batches stop."""
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            self._pause(self.draw.uniform(0, 2 * self.arguments.pause))
            kind, event = self.draw.choice(self._possible())
            self.events[kind] += 1
            event()
        if not happens(lambda: not self._living_guests(), within=TIMEOUT, meanwhile=self._look):
            raise Hang(f"{len(self.guests)} guests still live {TIMEOUT:.0f} s after the last event")

    def _possible(self) -> list[tuple[str, Callable[[], None]]]:
        events: list[tuple[str, Callable[[], None]]] = [
            ("target killed", lambda: self._end_target(signal.SIGKILL)),
            ("target told to stop", lambda: self._end_target(signal.SIGTERM)),
        ]
        if len(self._living_guests()) < _MOST_GUESTS:
            events += [("trainer comes", self._invite)] * 2
        if training := [guest for guest in self.guests if guest.trains]:
            guest = self.draw.choice(training)
            events.append(("trainer killed", lambda: self._end_guest(guest, signal.SIGKILL)))
            events.append(("trainer told to stop", lambda: self._end_guest(guest, signal.SIGTERM)))
        return events

    # --- events

    def _end_target(self, number: int) -> None:
        """Ends a target, which stays away for some seconds, and waits until it serves again."""
        service = self.stage.service
        worker = self.draw.choice([one for one in service.targets if one.name != STEADY_TARGET])
        moment = time.monotonic()
        code = service.end(worker, number, TIMEOUT)
        if code != (0 if number == signal.SIGTERM else -number):
            self.wrong.append(f"{worker.name} ended with code {code} after signal {number}")
        self._pause(max(WINDOW, self.draw.uniform(*_AWAY_SECONDS)))
        batches = self.stage.batch_times
        self.stage.wait(lambda: batches()[-1] > moment + WINDOW, f"a batch after the end of {worker.name}")
        self.stalls.append(longest_pause(batches(), moment, moment + WINDOW))
        service.revive()
        self.stage.wait(self.stage.serving, f"{worker.name} to serve again")

    def _invite(self) -> None:
        self._num_guests += 1
        service, name = self.stage.service, f"guest{self._num_guests}"
        training = service.workspace.training_settings(
            steps=self.arguments.guest_steps, seed=self._num_guests
        )
        settings = [*service.workspace.service_settings(service.address), *training, f"run.name={name}"]
        log = service.workspace.logs / f"{name}.log"
        process = service.zygote.command_line(["job=train", "rpc=elastic", *settings], log=log)
        self.guests.append(Guest(process, service.workspace.run_dir(name) / "metrics.jsonl"))

    def _end_guest(self, guest: Guest, number: int) -> None:
        # It may have finished just before.
        guest.codes = (0,) if number == signal.SIGTERM else (0, -number)
        guest.process.send(number)

    # --- looking

    def _pause(self, seconds: float) -> None:
        happens(lambda: False, within=seconds, meanwhile=self._look)

    def _look(self) -> None:
        if not self.stage.consumer.alive:
            raise Hang(f"the steady trainer has ended: {self.stage.consumer.end_of_log()}")
        now = time.monotonic()
        taken = next(iter(self.samples.values()), None)
        if taken is None or now - taken[-1].at >= _SAMPLE_SECONDS:
            for name, process in self.stays.items():
                self.samples.setdefault(name, []).append(Sample(now, *process.usage()))
            self._part_from_guests()
        time.sleep(_PAUSE_STEP)

    def _living_guests(self) -> list[Guest]:
        return [guest for guest in self.guests if guest.process.alive]

    def _part_from_guests(self) -> None:
        for guest in [guest for guest in self.guests if not guest.process.alive]:
            self.guests.remove(guest)
            if guest.process.poll() not in guest.codes and not guest.has_finished:
                log = guest.process.end_of_log()
                self.wrong.append(f"a guest ended with code {guest.process.poll()}: ...\n{log}")


def run(arguments: argparse.Namespace, zygote: Zygote, workspace: Workspace, isolation: Isolation) -> Report:
    """Registry, one target and one trainer stay from the first to the last minute."""
    report = Report(f"A soak of {arguments.minutes:g} minutes")
    surroundings = Surroundings.now(workspace, isolation, [zygote.pid])
    hangs, broken = [], []
    with observed(zygote, workspace, "soak", arguments.targets, arguments) as stage:
        service = stage.service
        stage.wait(lambda: stage.serving() and stage.num_batches > 0, "the service to start")
        stays = {name: service.workers[name].running for name in (REGISTRY, STEADY_TARGET)}
        soak = Soak(
            stage, arguments, {**stays, STEADY_TRAINER: stage.consumer}, random.Random(arguments.seed)
        )
        with ended_at_last(lambda: [guest.process for guest in soak.guests]):
            try:
                soak.run(arguments.minutes)
            except Hang as hang:
                hangs.append(str(hang))
        stage.consumer.kill()
        stage.consumer.ends(TIMEOUT)
        broken = take_down(service)
    report.checks = [
        Check.none_of("hangs over the configured deadline", hangs),
        Check.none_of("processes that ended without a reason", service.unexpected),
        Check.none_of("promises broken (exit codes)", soak.wrong + broken),
        Check.none_of("processes, ports or files left behind", surroundings.leftovers()),
        *(flat(name, samples) for name, samples in soak.samples.items()),
        *stall_checks(soak.stalls),
    ]
    report.notes.append(
        f"{stage.num_batches} batches for the trainer that stays, which takes {arguments.train_seconds:g} s "
        f"for each; {arguments.targets} targets, the first of which stays. Levels are medians after "
        f"{_EARLY[0]:.0%} to {_EARLY[1]:.0%} and {_LATE[0]:.0%} to {_LATE[1]:.0%} of the time."
    )
    report.tables += [table(("event", "number"), sorted(soak.events.items())), levels(soak.samples)]
    report.record = {
        "events": soak.events,
        "stalls": soak.stalls,
        "samples": {name: [one._asdict() for one in taken] for name, taken in soak.samples.items()},
    }
    return report


def level(samples: Sequence[Sample], window: tuple[float, float]) -> Sample:
    """Medians over a window, given as shares of the time."""
    first, seconds = samples[0].at, samples[-1].at - samples[0].at
    low, high = (first + share * seconds for share in window)
    chosen = [one for one in samples if low <= one.at <= high]
    return Sample(*(type(values[0])(statistics.median(values)) for values in zip(*chosen, strict=True)))


def flat(name: str, samples: Sequence[Sample]) -> Check:
    early, late = level(samples, _EARLY), level(samples, _LATE)
    growth = late.resident / early.resident - 1
    holds = (
        growth <= _MEMORY_GROWTH
        and late.descriptors <= early.descriptors + _MORE_DESCRIPTORS
        and late.threads <= early.threads + _MORE_THREADS
    )
    found = (
        f"memory {100 * growth:+.1f} %, descriptors {early.descriptors} to {late.descriptors}, "
        f"threads {early.threads} to {late.threads}"
    )
    rule = f"memory within {_MEMORY_GROWTH:.0%}, descriptors and threads flat"
    return Check(f"{name}: {rule}", holds, found, is_figure=True)


def stall_checks(stalls: Sequence[float]) -> list[Check]:
    if not stalls:
        return []
    name = "stall of the steady trainer at the end of a target"
    return [
        below(LONGEST, f"longest {name}", max(stalls)),
        below(MEDIAN, f"median {name}", statistics.median(stalls)),
    ]


def levels(samples: dict[str, list[Sample]]) -> str:
    def row(name: str, taken: Sequence[Sample]) -> tuple[Any, ...]:
        early, late = level(taken, _EARLY), level(taken, _LATE)
        memory = [mebibytes(one.resident) for one in (early, late)]
        own = [mebibytes(one.anonymous) for one in (early, late)]
        descriptors = max(one.descriptors for one in taken)
        threads = max(one.threads for one in taken)
        return (
            name,
            *memory,
            *own,
            early.descriptors,
            late.descriptors,
            descriptors,
            early.threads,
            late.threads,
            threads,
        )

    header = ("process", "memory early", "late", "of its own early", "late")
    counts = ("descriptors early", "late", "most", "threads early", "late", "most")
    return table((*header, *counts), [row(name, taken) for name, taken in samples.items()])
