"""One running service, registry, targets and trainer, kept alive as an operator's supervisor would."""

import socket
import time
from dataclasses import dataclass, field

from eagle_rpc.errors import EagleRpcError
from eagle_rpc.registry import Record, RegistryClient, load_token
from faults.processes import Process, Zygote, wait_until
from faults.progress import Progress
from faults.workplace import Workplace

REGISTRY, TRAINER = "registry", "trainer0"
_LOOK_SECONDS = 0.05


@dataclass
class Part:
    """One worker of the service and its present process."""

    name: str
    arguments: list[str]
    process: Process | None = None
    starts: int = 0
    # Why its process may end now; empty while it must not.
    may_end: str = ""

    @property
    def role(self) -> str:
        return self.name.rstrip("0123456789")

    @property
    def running(self) -> Process:
        assert self.process is not None
        return self.process


@dataclass(frozen=True)
class Restart:
    """A process that was started in place of one that had ended."""

    part: str
    why: str
    seconds_to_serve: float  # from process start to its record saying that it serves


@dataclass
class Service:
    """Starts parts, restarts those that end, and keeps account of both."""

    zygote: Zygote
    workplace: Workplace
    port: int
    name: str  # of its logs
    num_targets: int
    niceness: int = 0
    parts: dict[str, Part] = field(default_factory=dict)
    restarts: list[Restart] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    progress: Progress = field(init=False)  # of the newest run
    finished: bool = False  # its trainer has ended by itself, with code 0
    _awaited: dict[str, tuple[str, float]] = field(default_factory=dict)
    _last_records: float = 0.0
    _records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        common = self.workplace.service_settings(self.port)
        self._add(REGISTRY, ["job=registry", *common, "run.name=service"])
        for index in range(self.num_targets):
            self._add(
                f"target{index}", ["job=serve", *common, "run.name=service", f"topology.first_target={index}"]
            )

    def _add(self, name: str, arguments: list[str]) -> None:
        self.parts[name] = Part(name, arguments)

    @property
    def processes(self) -> list[Process]:
        return [part.process for part in self.parts.values() if part.process is not None]

    @property
    def targets(self) -> list[Part]:
        return [part for part in self.parts.values() if part.role == "target"]

    # --- starting

    def start(self) -> None:
        """Everything but a trainer."""
        for part in self.parts.values():
            self._start(part)

    def start_run(self, run: str, training: list[str]) -> None:
        """A trainer for a run of its own; an earlier one must have finished."""
        settings = self.workplace.service_settings(self.port)
        self._add(
            TRAINER,
            ["job=train", "rpc=elastic", *settings, *training, f"run.name={run}", "train.resume=auto"],
        )
        self.progress = Progress(self.workplace.run_dir(run) / "metrics.jsonl")
        self.finished = False
        self._start(self.parts[TRAINER])

    def _start(self, part: Part) -> None:
        # What the registry said before says nothing of what is there now.
        self._last_records = 0.0
        log = self.workplace.logs / f"{self.name}.{part.name}.log"
        part.process = self.zygote.command_line(part.arguments, log=log, niceness=self.niceness)
        part.starts += 1
        part.may_end = ""

    def revive(self) -> None:
        """Notes who has ended and starts it anew; the trainer stays away once it has finished."""
        for part in self.parts.values():
            if part.process is None or part.process.alive or (part.name == TRAINER and self.finished):
                continue
            code = part.process.poll()
            if part.name == TRAINER and code == 0 and not part.may_end:
                self.finished = True
                continue
            why = part.may_end
            if not why:
                why = "unexpected"
                self.unexpected.append(
                    f"{part.name} ended with code {code}: ...\n{part.process.end_of_log()}"
                )
            self._start(part)
            if part.role == "target":
                self._awaited[part.name] = (why, part.running.started)

    # --- looking

    def record_of(self, part: Part) -> Record | None:
        """What the registry says of the part's present process."""
        found = [record for record in self.records() if record.pid == part.running.pid]
        return found[0] if found else None

    def records(self) -> list[Record]:
        """The living, as of a moment ago; none while the registry does not answer."""
        if time.monotonic() - self._last_records >= _LOOK_SECONDS:
            self._last_records = time.monotonic()
            try:
                client = RegistryClient(
                    f"127.0.0.1:{self.port}", load_token(self.workplace.token), timeout=1.0
                )
                self._records = [one.record for one in client.records() if one.living]
            except EagleRpcError:
                self._records = []
        return self._records

    def serving(self, part: Part) -> bool:
        """Whether its present process has announced that it serves."""
        record = self.record_of(part)
        return part.running.alive and record is not None and record.status.get("draining") is False

    def whole(self) -> bool:
        """Whether everything is there."""
        for part in self.targets:
            if not self.serving(part):
                return False
            if part.name in self._awaited:
                why, started = self._awaited.pop(part.name)
                self.restarts.append(Restart(part.name, why, time.monotonic() - started))
        return all(
            part.running.alive for part in self.parts.values() if part.name != TRAINER or not self.finished
        )

    # --- ending

    def end(self, part: Part, number: int, seconds: float) -> int | None:
        """Sends a signal that must end the part; its exit code, or None if it lives on after `seconds`."""
        part.may_end = f"signal {number}"
        part.running.send(number)
        wait_until(lambda: not part.running.alive, seconds)
        return part.running.poll()


def free_ports(count: int) -> list[int]:
    """Ports that nobody has; taken together, so that they differ."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
