"""A service of registry, targets and trainer, whose workers are started anew when they end, as a supervisor
would do.
"""

import itertools
import time
from dataclasses import dataclass, field

from support.processes import Process, free_port

from eagle_rpc.errors import EagleRpcError
from eagle_rpc.registry import Record, RegistryClient, load_token
from eagle_rpc.topology import stage_name
from faults.launcher import Launch
from faults.progress import Progress
from faults.workspace import Workspace
from faults.zygote import Zygote

REGISTRY, TRAINER = "registry", "trainer0"
_LOOK_SECONDS = 0.05


@dataclass
class Worker:
    """A worker of the service and its current process."""

    name: str
    arguments: list[str]
    process: Process | None = None
    may_end: str = ""  # why its process may end now; empty while it must not

    @property
    def role(self) -> str:
        return "stage" if "." in self.name else self.name.rstrip("0123456789")

    @property
    def running(self) -> Process:
        assert self.process is not None
        return self.process


@dataclass(frozen=True)
class Restart:
    """A process that was started after the one before had ended."""

    worker: str
    why: str
    seconds_to_serve: float  # from the start of the process until its record says that it serves


@dataclass
class Service:
    """Starts workers, restarts them when they end, and records both."""

    zygote: Zygote
    workspace: Workspace
    port: int
    name: str  # the beginning of its logs' names
    num_targets: int
    num_stages: int = 1  # of each target, each a worker
    num_trainers: int = 1  # of a run; several are the workers of one launcher
    niceness: int = 0
    workers: dict[str, Worker] = field(default_factory=dict)
    restarts: list[Restart] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    progress: Progress = field(init=False)  # of the newest run
    finished: bool = False  # the trainer of this run has ended by itself with code 0
    _awaited: dict[str, tuple[str, float]] = field(default_factory=dict)
    _last_records: float = 0.0
    _records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        common = self.workspace.service_settings(self.address)
        self._add(REGISTRY, ["job=registry", *common, "run.name=service"])
        for index, stage in itertools.product(range(self.num_targets), range(self.num_stages)):
            place = [f"topology.first_target={index}", f"topology.first_stage={stage}"]
            place.append(f"topology.stages_per_target={self.num_stages}")
            self._add(stage_name(f"target{index}", stage), ["job=serve", *common, "run.name=service", *place])

    def _add(self, name: str, arguments: list[str]) -> None:
        self.workers[name] = Worker(name, arguments)

    @property
    def address(self) -> str:
        """Of the registry."""
        return f"127.0.0.1:{self.port}"

    @property
    def processes(self) -> list[Process]:
        return [worker.process for worker in self.workers.values() if worker.process is not None]

    @property
    def targets(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.role == "target"]

    @property
    def stages(self) -> list[Worker]:
        """Those of targets behind their first ones."""
        return [worker for worker in self.workers.values() if worker.role == "stage"]

    # --- starting

    def start(self) -> None:
        """Starts registry and targets."""
        for worker in self.workers.values():
            self._start(worker)

    def start_run(self, run: str, training: list[str]) -> None:
        """Starts a trainer for a new run; the run before must have finished."""
        settings = self.workspace.service_settings(self.address)
        self._add(
            TRAINER,
            ["job=train", "rpc=elastic", *settings, *training, f"run.name={run}", "train.resume=auto"],
        )
        self.progress = Progress(self.workspace.run_dir(run) / "metrics.jsonl")
        self.finished = False
        self._start(self.workers[TRAINER])

    def _start(self, worker: Worker) -> None:
        # The records of a moment ago are out of date.
        self._last_records = 0.0
        log = self.workspace.logs / f"{self.name}.{worker.name}.log"
        if worker.name == TRAINER and self.num_trainers > 1:
            launch = Launch(size=self.num_trainers, count=self.num_trainers, port=free_port())
            arguments = [launch.to_argument(), *worker.arguments]
            worker.process = self.zygote.fork(
                "faults.launcher:main", arguments, log=log, niceness=self.niceness
            )
        else:
            worker.process = self.zygote.command_line(worker.arguments, log=log, niceness=self.niceness)
        worker.may_end = ""

    def revive(self) -> None:
        """Starts workers anew that have ended, except a trainer that has finished."""
        for worker in self.workers.values():
            if worker.process is None or worker.process.alive or (worker.name == TRAINER and self.finished):
                continue
            code = worker.process.poll()
            if worker.name == TRAINER and code == 0 and not worker.may_end:
                self.finished = True
                continue
            why = worker.may_end
            if not why:
                why = "unexpected"
                self.unexpected.append(
                    f"{worker.name} ended with code {code}: ...\n{worker.process.end_of_log()}"
                )
            self._start(worker)
            if worker.role == "target":
                self._awaited[worker.name] = (why, worker.running.started)

    # --- looking

    def record_of(self, worker: Worker) -> Record | None:
        """The registry's record of the worker's current process."""
        found = [record for record in self.records() if record.pid == worker.running.pid]
        return found[0] if found else None

    def records(self) -> list[Record]:
        """Records of living workers, at most 0.05 s old; empty while the registry does not answer."""
        if time.monotonic() - self._last_records >= _LOOK_SECONDS:
            self._last_records = time.monotonic()
            try:
                client = RegistryClient(self.address, load_token(self.workspace.token), timeout=1.0)
                self._records = [one.record for one in client.records() if one.living]
            except EagleRpcError:
                self._records = []
        return self._records

    def serving(self, worker: Worker) -> bool:
        """Whether the worker's current process has announced that it serves."""
        record = self.record_of(worker)
        return worker.running.alive and record is not None and record.status.get("draining") is False

    def complete(self) -> bool:
        """Whether all targets serve and all other workers live. Records the restarts that this ends."""
        for worker in self.targets:
            if not self.serving(worker):
                return False
            if worker.name in self._awaited:
                why, started = self._awaited.pop(worker.name)
                self.restarts.append(Restart(worker.name, why, time.monotonic() - started))
        return all(
            worker.running.alive
            for worker in self.workers.values()
            if worker.name != TRAINER or not self.finished
        )

    # --- ending

    def end(self, worker: Worker, number: int, seconds: float) -> int | None:
        """Sends a signal that must end the worker; its exit code, None if it lives after `seconds`."""
        worker.may_end = f"signal {number}"
        worker.running.send(number)
        worker.running.ends(seconds)
        return worker.running.poll()
