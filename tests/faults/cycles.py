"""`cycles`: starts and stops in every mode. Each must end in time and leave nothing behind."""

import argparse
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from support.processes import Command, Process, descendants, ended_at_last, free_ports
from support.reporting import table
from support.waiting import happens, pause

from faults.checks import Check, Surroundings
from faults.isolation import Isolation
from faults.launcher import Launch
from faults.report import Report, spread
from faults.workspace import DRAIN_TIMEOUT, SHUTDOWN_TIMEOUT, Workspace
from faults.zygote import Zygote

_START_TIMEOUT = 60.0
_END_TIMEOUT = DRAIN_TIMEOUT + SHUTDOWN_TIMEOUT + 15.0
_EARLY_SHARE, _EARLY_SECONDS = 0.25, 2.0
_SECOND_SIGNAL_SECONDS = 0.3
_STEPS, _ENDLESS = 3, 10**6
_BY_SECOND_SIGNAL = 128 + signal.SIGINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=300)


@dataclass
class Trial:
    """The ports, files and processes of one cycle."""

    zygote: Zygote
    workspace: Workspace
    number: int
    ports: list[int] = field(default_factory=lambda: free_ports(2))
    processes: dict[str, Process] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"cycle{self.number}"

    @property
    def metrics(self) -> Path:
        return self.workspace.run_dir(self.name) / "metrics.jsonl"

    def log(self, worker: str) -> Path:
        return self.workspace.logs / f"{self.name}.{worker}.log"

    def settings(self, steps: int) -> list[str]:
        training = self.workspace.training_settings(steps=steps, seed=0)
        service = self.workspace.service_settings(f"127.0.0.1:{self.ports[0]}")
        return [*service, *training, f"run.name={self.name}"]

    def start(self, worker: str, *arguments: str, steps: int) -> None:
        command = [*arguments, *self.settings(steps)]
        self.processes[worker] = self.zygote.command_line(command, log=self.log(worker))

    def says(self, worker: str, text: str) -> bool:
        return text in self.log(worker).read_text(errors="replace")

    def ends_of_logs(self) -> str:
        return "; ".join(f"{name}: {process.end_of_log(5)}" for name, process in self.processes.items())


def start_static(trial: Trial, steps: int) -> None:
    launch = Launch(size=2, count=2, port=trial.ports[1])
    arguments = [launch.to_argument(), "job=train", "topology=1x1", *trial.settings(steps)]
    trial.processes["launcher"] = trial.zygote.fork(
        "faults.launcher:main", arguments, log=trial.log("launcher")
    )


def start_torchrun(trial: Trial, steps: int) -> None:
    torchrun = [
        sys.executable,
        *"-m torch.distributed.run --standalone --nproc-per-node=2 -m eagle_rpc".split(),
    ]
    arguments = [*torchrun, "job=train", "topology=1x1", *trial.settings(steps)]
    launcher = Command("launcher", arguments, trial.workspace.environment)
    trial.processes["launcher"] = launcher.start(log=trial.log("launcher"), directory=trial.workspace.path)


def start_single(trial: Trial, steps: int) -> None:
    trial.start("worker", "job=train", "topology=single", steps=steps)


def start_elastic(trial: Trial, steps: int) -> None:
    trial.start("registry", "job=registry", steps=steps)
    trial.start("target", "job=serve", steps=steps)
    trial.start("trainer", "job=train", "rpc=elastic", steps=steps)


def start_hosting(trial: Trial, steps: int) -> None:
    trial.start("target", "job=serve", "rpc.host_registry=true", steps=steps)


def start_registry(trial: Trial, steps: int) -> None:
    trial.start("registry", "job=registry", steps=steps)


def trains(trial: Trial) -> bool:
    return trial.metrics.exists() and trial.metrics.stat().st_size > 0


def hosting_target_serves(trial: Trial) -> bool:
    return trial.says("target", "serving ")


def registry_listens(trial: Trial) -> bool:
    return trial.says("registry", "listens on")


@dataclass(frozen=True)
class Mode:
    """A way to run the program."""

    name: str
    start: Callable[[Trial, int], None]
    under_way: Callable[[Trial], bool]
    finishes: bool  # its trainer ends by itself
    tells: bool = True  # its exit codes after a signal are those of the workers
    share: int = 10


MODES = (
    Mode("static 1x1 under a launcher", start_static, trains, finishes=True),
    Mode("static 1x1 under torchrun", start_torchrun, trains, finishes=True, tells=False, share=1),
    Mode("single", start_single, trains, finishes=True),
    Mode("elastic: registry, target, trainer", start_elastic, trains, finishes=True),
    Mode("target that hosts the registry", start_hosting, hosting_target_serves, finishes=False, share=5),
    Mode("registry", start_registry, registry_listens, finishes=False, share=3),
)
_SHARED_COPY = "/dev/shm/eagle_rpc-"
_FINISH, _TERMINATE, _INTERRUPT, _TWICE, _KILL = "finish", "SIGTERM", "SIGINT", "SIGINT twice", "SIGKILL"
_SIGNALS = {
    _TERMINATE: signal.SIGTERM,
    _INTERRUPT: signal.SIGINT,
    _TWICE: signal.SIGINT,
    _KILL: signal.SIGKILL,
}


@dataclass
class Cycle:
    """One start and stop, and its result."""

    mode: str
    stop: str
    early: bool  # the signal comes during the start
    stopped: float = 0.0  # time.monotonic of the signal, or of the trainer's end
    seconds: float = 0.0  # from then until nothing was left
    codes: dict[str, int | None] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)


def run(arguments: argparse.Namespace, zygote: Zygote, workspace: Workspace, isolation: Isolation) -> Report:
    report = Report("Starts and stops")
    draw = random.Random(arguments.seed)
    cycles = []
    modes = draw.choices(
        MODES, weights=[mode.share for mode in MODES], k=max(0, arguments.count - len(MODES))
    )
    for number, mode in enumerate([*MODES, *modes][: arguments.count]):
        surroundings = Surroundings.now(workspace, isolation, [zygote.pid])
        trial = Trial(zygote, workspace, number)
        cycle = Cycle(
            mode.name, draw.choice([_FINISH, *_SIGNALS] if mode.finishes else [*_SIGNALS]), early=False
        )
        cycle.early = cycle.stop != _FINISH and draw.random() < _EARLY_SHARE
        with ended_at_last(lambda trial=trial: list(trial.processes.values())):
            perform(trial, mode, cycle, draw)
            happens(lambda now=(surroundings, cycle): not left_behind(*now), within=_END_TIMEOUT)
            cycle.seconds = time.monotonic() - cycle.stopped
            cycle.leftovers = left_behind(surroundings, cycle)
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


def left_behind(surroundings: Surroundings, cycle: Cycle) -> list[str]:
    """Without the shared copy of a trainer that ended at once: the next trainer of the host removes it."""
    found = surroundings.leftovers()
    if cycle.stop in (_KILL, _TWICE):
        found = [one for one in found if not one.startswith(_SHARED_COPY)]
    return found


def perform(trial: Trial, mode: Mode, cycle: Cycle, draw: random.Random) -> None:
    """Starts, waits until the mode is under way unless the stop is early, stops, and waits for the end."""
    mode.start(trial, _STEPS if cycle.stop == _FINISH else _ENDLESS)
    if cycle.early:
        pause(draw.uniform(0, _EARLY_SECONDS))
    elif not happens(lambda: mode.under_way(trial), within=_START_TIMEOUT):
        cycle.hangs.append(f"not under way after {_START_TIMEOUT:.0f} s: {trial.ends_of_logs()}")
    if cycle.stop == _FINISH:
        finish(trial, cycle)
    else:
        stop(trial, cycle, draw)
    for worker, process in trial.processes.items():
        code = cycle.codes[worker] = process.poll()
        what = f"after {cycle.stop}: {process.end_of_log(5)}"
        if code is None:
            cycle.hangs.append(f"{worker} lives {_END_TIMEOUT:.0f} s {what}")
        elif not cycle.early and mode.tells and code not in promised_codes(cycle.stop):
            cycle.wrong.append(f"{worker} ended with code {code} {what}")


def finish(trial: Trial, cycle: Cycle) -> None:
    """The last worker finishes by itself; then the others get SIGTERM, the newest first."""
    *services, worker = trial.processes.values()
    worker.ends(_START_TIMEOUT)
    cycle.stopped = time.monotonic()
    for service in reversed(services):
        service.send(signal.SIGTERM)
        service.ends(_END_TIMEOUT)


def stop(trial: Trial, cycle: Cycle, draw: random.Random) -> None:
    """Signals all workers at once, in random order."""
    cycle.stopped = time.monotonic()
    processes = draw.sample(list(trial.processes.values()), len(trial.processes))
    for process in processes:
        process.send(_SIGNALS[cycle.stop])
    if cycle.stop == _TWICE:
        pause(draw.uniform(0, _SECOND_SIGNAL_SECONDS))
        for process in processes:
            process.send(_SIGNALS[cycle.stop])
    happens(lambda: not any(process.alive for process in processes), within=_END_TIMEOUT)


def promised_codes(how: str) -> tuple[int, ...]:
    """0, except after SIGKILL. A second SIGINT may reach Python at its own end: -SIGINT, or 130 from a shell."""
    return {_TWICE: (0, _BY_SECOND_SIGNAL, -signal.SIGINT), _KILL: (-signal.SIGKILL,)}.get(how, (0,))


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
        (mode, how, len(group), sum(one.early for one in group), spread([one.seconds for one in group]))
        for (mode, how), group in sorted(groups.items())
    ]
    header = ("mode", "ended by", "cycles", "of them during the start", "to the end, s (median, longest)")
    report.tables.append(table(header, rows))
    report.record = {"cycles": [asdict(cycle) for cycle in cycles]}
