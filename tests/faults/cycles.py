"""`faults.py cycles`: starts and stops in every mode, each bounded, with nothing left behind."""

import argparse
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from faults.checks import Check, Surroundings
from faults.isolation import Isolation
from faults.processes import Process, Zygote, descendants, ended_at_last, wait_until
from faults.report import Report, spread, table
from faults.service import free_ports
from faults.workplace import DRAIN_TIMEOUT, SHUTDOWN_TIMEOUT, Workplace

_START_TIMEOUT = 60.0
_END_TIMEOUT = DRAIN_TIMEOUT + SHUTDOWN_TIMEOUT + 15.0
_EARLY_SHARE, _EARLY_SECONDS = 0.25, 2.0
_SECOND_SIGNAL_SECONDS = 0.3
_STEPS, _ENDLESS = 3, 10**6
_BY_SECOND_SIGNAL = 128 + signal.SIGINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=300)


@dataclass
class Stand:
    """Where one cycle takes place."""

    zygote: Zygote
    workplace: Workplace
    number: int
    ports: list[int] = field(default_factory=lambda: free_ports(2))
    processes: dict[str, Process] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"cycle{self.number}"

    @property
    def metrics(self) -> Path:
        return self.workplace.run_dir(self.name) / "metrics.jsonl"

    def log(self, part: str) -> Path:
        return self.workplace.logs / f"{self.name}.{part}.log"

    def settings(self, steps: int) -> list[str]:
        service, training = (
            self.workplace.service_settings(self.ports[0]),
            self.workplace.training_settings(steps=steps, seed=0),
        )
        return [*service, *training, f"run.name={self.name}"]

    def start(self, part: str, arguments: list[str]) -> None:
        self.processes[part] = self.zygote.command_line(arguments, log=self.log(part))

    def says(self, part: str, text: str) -> bool:
        return text in self.log(part).read_text(errors="replace")


def start_static(stand: Stand, steps: int) -> None:
    arguments = ["2", str(stand.ports[1]), "job=train", "topology=1x1", *stand.settings(steps)]
    stand.processes["launcher"] = stand.zygote.fork(
        "faults.launcher:main", arguments, log=stand.log("launcher")
    )


def start_torchrun(stand: Stand, steps: int) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "eagle_rpc",
    ]
    command = [*torchrun, "job=train", "topology=1x1", *stand.settings(steps)]
    with stand.log("launcher").open("w") as log:
        environment = {**psutil.Process().environ(), **stand.workplace.environment}
        popen = subprocess.Popen(
            command,
            cwd=stand.workplace.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    stand.processes["launcher"] = Process(popen.pid, stand.log("launcher"))


def start_single(stand: Stand, steps: int) -> None:
    stand.start("worker", ["job=train", "topology=single", *stand.settings(steps)])


def start_elastic(stand: Stand, steps: int) -> None:
    stand.start("registry", ["job=registry", *stand.settings(steps)])
    stand.start("target", ["job=serve", *stand.settings(steps)])
    stand.start("trainer", ["job=train", "rpc=elastic", *stand.settings(steps)])


def start_hosting(stand: Stand, steps: int) -> None:
    stand.start("target", ["job=serve", "rpc.host_registry=true", *stand.settings(steps)])


def start_registry(stand: Stand, steps: int) -> None:
    stand.start("registry", ["job=registry", *stand.settings(steps)])


def trains(stand: Stand) -> bool:
    return stand.metrics.exists() and stand.metrics.stat().st_size > 0


@dataclass(frozen=True)
class Mode:
    """A way to run the program, and when it is under way."""

    name: str
    start: Callable[[Stand, int], None]
    under_way: Callable[[Stand], bool]
    finishes: bool  # by itself, its trainer at least
    tells: bool = True  # its exit code after a signal is the workers', not a launcher's own
    share: int = 10


MODES = (
    Mode("static 1x1 under a launcher", start_static, trains, finishes=True),
    Mode("static 1x1 under torchrun", start_torchrun, trains, finishes=True, tells=False, share=1),
    Mode("single", start_single, trains, finishes=True),
    Mode("elastic: registry, target, trainer", start_elastic, trains, finishes=True),
    Mode(
        "target that hosts the registry",
        start_hosting,
        lambda stand: stand.says("target", "serving "),
        finishes=False,
        share=5,
    ),
    Mode(
        "registry",
        start_registry,
        lambda stand: stand.says("registry", "listens on"),
        finishes=False,
        share=3,
    ),
)
_FINISH, _TERMINATE, _INTERRUPT, _TWICE, _KILL = "finish", "SIGTERM", "SIGINT", "SIGINT twice", "SIGKILL"
_SIGNALS = {
    _TERMINATE: signal.SIGTERM,
    _INTERRUPT: signal.SIGINT,
    _TWICE: signal.SIGINT,
    _KILL: signal.SIGKILL,
}


@dataclass
class Cycle:
    """One start and stop, and what came of it."""

    mode: str
    stop: str
    early: bool  # the signal came while it was starting
    stopped: float = 0.0  # when it was told to, or its trainer had finished; time.monotonic
    seconds: float = 0.0  # from then until nothing was left of it
    codes: dict[str, int | None] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)


def run(arguments: argparse.Namespace, zygote: Zygote, workplace: Workplace, isolation: Isolation) -> Report:
    report = Report("Starts and stops")
    draw = random.Random(arguments.seed)
    cycles = []
    modes = draw.choices(
        MODES, weights=[mode.share for mode in MODES], k=max(0, arguments.count - len(MODES))
    )
    for number, mode in enumerate([*MODES, *modes][: arguments.count]):
        surroundings = Surroundings.now(workplace, isolation, [zygote.pid])
        stand = Stand(zygote, workplace, number)
        cycle = Cycle(
            mode.name, draw.choice([_FINISH, *_SIGNALS] if mode.finishes else [*_SIGNALS]), early=False
        )
        cycle.early = cycle.stop != _FINISH and draw.random() < _EARLY_SHARE
        with ended_at_last(lambda stand=stand: list(stand.processes.values())):
            perform(stand, mode, cycle, draw)
            wait_until(lambda found=surroundings: not found.leftovers(), _END_TIMEOUT)
            cycle.seconds = time.monotonic() - cycle.stopped
            cycle.leftovers = surroundings.leftovers()
        for process in descendants(without={zygote.pid}):
            process.kill()
        cycles.append(cycle)
        trouble = "; ".join([*cycle.hangs, *cycle.wrong, *cycle.leftovers])
        print(
            f"{number + 1}/{arguments.count} {cycle.mode}, {cycle.stop}{' early' if cycle.early else ''}: "
            f"{cycle.seconds:.2f} s, {cycle.codes} {trouble}",
            flush=True,
        )
    _fill(report, cycles)
    return report


def perform(stand: Stand, mode: Mode, cycle: Cycle, draw: random.Random) -> None:
    """Starts, waits until it is under way or not, stops, waits for the end."""
    mode.start(stand, _STEPS if cycle.stop == _FINISH else _ENDLESS)
    if cycle.early:
        time.sleep(draw.uniform(0, _EARLY_SECONDS))
    elif not wait_until(lambda: mode.under_way(stand), _START_TIMEOUT):
        cycle.hangs.append(f"not under way after {_START_TIMEOUT:.0f} s: {ends_of_logs(stand)}")
    if cycle.stop == _FINISH:
        finish(stand, cycle)
    else:
        stop(stand, cycle, draw)
    for part, process in stand.processes.items():
        cycle.codes[part] = process.poll()
        if process.alive:
            cycle.hangs.append(
                f"{part} lives on {_END_TIMEOUT:.0f} s after {cycle.stop}: {process.end_of_log(5)}"
            )
        elif not cycle.early and mode.tells and process.poll() not in promised_codes(cycle.stop):
            cycle.wrong.append(
                f"{part} ended with code {process.poll()} after {cycle.stop}: {process.end_of_log(5)}"
            )


def finish(stand: Stand, cycle: Cycle) -> None:
    """The last part finishes by itself, services are told to stop."""
    *services, worker = stand.processes.values()
    wait_until(lambda: not worker.alive, _START_TIMEOUT)
    cycle.stopped = time.monotonic()
    for service in reversed(services):
        service.send(signal.SIGTERM)
        wait_until(lambda service=service: not service.alive, _END_TIMEOUT)


def stop(stand: Stand, cycle: Cycle, draw: random.Random) -> None:
    """All parts at once, in any order."""
    cycle.stopped = time.monotonic()
    processes = draw.sample(list(stand.processes.values()), len(stand.processes))
    for process in processes:
        process.send(_SIGNALS[cycle.stop])
    if cycle.stop == _TWICE:
        time.sleep(draw.uniform(0, _SECOND_SIGNAL_SECONDS))
        for process in processes:
            process.send(_SIGNALS[cycle.stop])
    wait_until(lambda: not any(process.alive for process in processes), _END_TIMEOUT)


def promised_codes(how: str) -> tuple[int, ...]:
    """0; a second SIGINT may come when the job is done and Python itself is ending, and a shell tells both ends as 130."""
    return {_TWICE: (0, _BY_SECOND_SIGNAL, -signal.SIGINT), _KILL: (-signal.SIGKILL,)}.get(how, (0,))


def ends_of_logs(stand: Stand) -> str:
    return "; ".join(f"{part}: {process.end_of_log(5)}" for part, process in stand.processes.items())


def _fill(report: Report, cycles: list[Cycle]) -> None:
    def findings(kind: str) -> list[str]:
        return [f"{cycle.mode}, {cycle.stop}: {one}" for cycle in cycles for one in getattr(cycle, kind)]

    report.checks = [
        Check.none_of(f"hangs in {len(cycles)} cycles", findings("hangs")),
        Check.none_of(
            "processes, ports, shared memory or temporary files left behind", findings("leftovers")
        ),
        Check.none_of("exit codes other than promised", findings("wrong")),
    ]
    groups: dict[tuple[str, str], list[Cycle]] = defaultdict(list)
    for cycle in cycles:
        groups[cycle.mode, cycle.stop].append(cycle)
    rows = [
        (
            mode,
            how,
            len(group),
            sum(cycle.early for cycle in group),
            spread([cycle.seconds for cycle in group]),
        )
        for (mode, how), group in sorted(groups.items())
    ]
    report.tables.append(
        table(
            ("mode", "ended by", "cycles", "of them while starting", "to the end, s (median, longest)"), rows
        )
    )
    report.record = {"cycles": [asdict(cycle) for cycle in cycles]}
