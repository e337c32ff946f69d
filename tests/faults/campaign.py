"""Training runs under a schedule of faults: each fault hits when everything has recovered from the one before."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from support.waiting import happens

from faults.injections import STEADY_TARGET, Context
from faults.schedule import Fault
from faults.service import TRAINER, Service
from faults.workspace import RECONNECT_DEADLINE

_USAGE_SECONDS = 1.0
_LOOK_SECONDS = 0.02
_END_TIMEOUT = 60.0
# Shares of the faults between which memory is measured: after warm-up, and at the end.
WARM, LAST = (0.1, 0.2), (0.9, 1.0)


class Hang(Exception):
    """A wait was longer than the configured deadline."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A fault and its consequences. Times in seconds."""

    number: int
    kind: str
    victim: str
    at: float  # since the start of the run
    step: int
    stall: float  # the longest pause between two optimiser steps around it
    recovery: float  # from the end of the fault until all workers served again and training went on
    details: dict[str, Any]


class Usage(NamedTuple):
    """Memory, descriptors and threads of a process."""

    at: float  # time.monotonic
    hits: int  # faults so far
    resident: int  # bytes
    anonymous: int  # of these, bytes that belong to no file
    descriptors: int
    threads: int


@dataclass
class Campaign:
    """Hits a service with one schedule after the other, each in a training run of its own."""

    context: Context
    started: float = field(default_factory=time.monotonic)
    hits: list[Hit] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)  # of the steady target
    failures: list[str] = field(default_factory=list)  # faults that could not be injected

    def __post_init__(self) -> None:
        self.context.observe = self._observe
        self._service = self.context.service

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def run(self, name: str, training: list[str], schedule: list[Fault]) -> None:
        """One training run: returns when it has finished and all targets serve. Raises `Hang` after the deadline."""
        self._service.start_run(name, training)
        for fault in schedule:
            self._wait(
                lambda fault=fault: self._service.progress.step >= fault.step,
                f"step {fault.step}",
                while_advancing=True,
            )
            if self._service.finished:
                break
            self._hit(fault)
        self._wait(lambda: False, f"{name} to finish", while_advancing=True)
        if not happens(self._service.complete, within=RECONNECT_DEADLINE, meanwhile=self._observe):
            raise Hang(f"waited {RECONNECT_DEADLINE:.0f} s for targets and registry after {name}")

    def _hit(self, fault: Fault) -> None:
        self._wait(self._service.complete, f"all targets to serve before {fault.kind.name}")
        progress, at = self._service.progress, self.seconds
        step = progress.step
        progress.restart_clock()
        try:
            details = fault.kind.inject(
                self.context, self._service.workers[fault.victim], random.Random(fault.seed)
            )
        except (OSError, RuntimeError) as error:
            self.failures.append(f"{fault.kind.name} of {fault.victim}: {type(error).__name__}: {error}")
            return
        progress.look()
        ended, advanced = time.monotonic(), progress.advanced
        self._wait(
            lambda: self._service.complete() and progress.advanced > advanced,
            f"recovery from {fault.kind.name}, {fault.victim}",
        )
        for worker in self._service.workers.values():
            worker.may_end = ""
        hit = Hit(
            number=len(self.hits) + 1,
            kind=fault.kind.name,
            victim=fault.victim,
            at=at,
            step=step,
            stall=progress.longest_pause,
            recovery=time.monotonic() - ended,
            details=details,
        )
        self.hits.append(hit)
        print(
            f"{hit.at:7.1f} s  step {hit.step:6}  {hit.number:4}  {hit.kind}, {hit.victim}: "
            f"stall {hit.stall:.2f} s, recovered after {hit.recovery:.2f} s",
            flush=True,
        )

    def _wait(self, holds: Callable[[], bool], what: str, *, while_advancing: bool = False) -> None:
        """Returns when it holds or the trainer has finished.

        Raises `Hang` after the deadline, which begins anew with every step if `while_advancing`.
        """
        since = time.monotonic()
        while not self._service.finished and not holds():
            self._observe()
            if while_advancing:
                since = max(since, self._service.progress.last_advance)
            if time.monotonic() - since > RECONNECT_DEADLINE:
                raise Hang(
                    f"waited {RECONNECT_DEADLINE:.0f} s for {what} at step {self._service.progress.step}"
                )
            time.sleep(_LOOK_SECONDS)

    def _observe(self) -> None:
        self._service.progress.look()
        self._service.revive()
        survivor = self._service.workers[STEADY_TARGET].running
        if survivor.alive and (not self.usage or time.monotonic() - self.usage[-1].at >= _USAGE_SECONDS):
            self.usage.append(Usage(time.monotonic(), len(self.hits), *survivor.usage()))

    def usage_levels(self) -> tuple[Usage, Usage]:
        """Medians after warm-up and at the end."""
        warm, last = (
            [one for one in self.usage if low <= one.hits / len(self.hits) <= high]
            for low, high in (WARM, LAST)
        )
        return median_usage(warm or self.usage), median_usage(last or self.usage)


def median_usage(samples: list[Usage]) -> Usage:
    return Usage(*(type(values[0])(statistics.median(values)) for values in zip(*samples, strict=True)))


def finish_undisturbed(service: Service) -> None:
    """Waits for a run without faults. Raises `Hang` if it stops advancing, `RuntimeError` if a worker ends."""
    while not service.finished:
        service.progress.look()
        service.revive()
        if service.unexpected:
            raise RuntimeError(f"the undisturbed run was disturbed: {service.unexpected}")
        if time.monotonic() - service.progress.last_advance > RECONNECT_DEADLINE:
            raise Hang(
                f"the undisturbed run has been at step {service.progress.step} for {RECONNECT_DEADLINE:.0f} s"
            )
        time.sleep(_LOOK_SECONDS)


def take_down(service: Service) -> list[str]:
    """Ends targets and registry by SIGTERM; the broken promises."""
    wrong = []
    for worker in [*service.targets, *service.stages, service.workers["registry"]]:
        code = service.end(worker, 15, _END_TIMEOUT)
        if code != 0:
            wrong.append(
                f"{worker.name} must end with code 0 after SIGTERM, got {code}: ...\n{worker.running.end_of_log()}"
            )
    trainer = service.workers.get(TRAINER)
    if trainer is not None and trainer.running.alive:
        wrong.append("the trainer still lives")
    return wrong
