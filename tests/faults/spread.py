"""A service over several hosts: registry, targets and trainers of one run, each where it is placed."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from support.hosts import INTERFACE, Host
from support.processes import Process
from support.waiting import happens

from faults.launcher import Launch
from faults.progress import Progress
from faults.service import REGISTRY
from faults.workspace import RECONNECT_DEADLINE, Workspace
from faults.zygote import Zygote

# Hosts are new, so all their ports are free.
_REGISTRY_PORT, _STORE_PORT = 29711, 29712
_END_SECONDS = 60.0


@dataclass
class SpreadService:
    """Places are by worker: `registry`, `target0`, ..., `trainer0`, ...; trainers of a host have following numbers."""

    zygote: Zygote
    workspace: Workspace
    places: Mapping[str, Host]
    name: str  # of the run, and the beginning of its logs' names
    interface: str = INTERFACE
    address_of: Callable[[Host], str] = lambda host: host.address  # on the interface
    running: dict[str, Process] = field(
        default_factory=dict
    )  # by worker; trainers of one host are one launcher

    def start(self, training: list[str]) -> None:
        """Starts everything at once."""
        self.progress = Progress(self.workspace.run_dir(self.name) / "metrics.jsonl")
        for name, host in self.places.items():
            if name == REGISTRY:
                self._run(name, host, ["job=registry"])
            elif name.startswith("target"):
                number = name.removeprefix("target")
                self._run(name, host, ["job=serve", f"topology.first_target={number}"])
        trainers = [name for name in self.places if name.startswith("trainer")]
        for first, host in self._hosts_of(trainers):
            launch = Launch(
                size=len(trainers),
                count=sum(self.places[name] is host for name in trainers),
                first=first,
                address=self.address_of(self.places["trainer0"]),
                port=_STORE_PORT,
            )
            self._run(f"trainer{first}", host, ["job=train", "rpc=elastic", *training], launch)

    def _hosts_of(self, trainers: list[str]) -> list[tuple[int, Host]]:
        """The first trainer's number on each host."""
        found: list[tuple[int, Host]] = []
        for number, name in enumerate(trainers):
            if self.places[name] not in [host for _, host in found]:
                found.append((number, self.places[name]))
        return found

    def _run(self, name: str, host: Host, words: list[str], launch: Launch | None = None) -> None:
        registry = f"{self.address_of(self.places[REGISTRY])}:{_REGISTRY_PORT}"
        settings = [*self.workspace.service_settings(registry), f"rpc.interface={self.interface}"]
        log = self.workspace.logs / f"{self.name}.{name}.log"
        arguments = [*words, *settings, f"run.name={self.name}"]
        if launch is None:
            self.running[name] = self.zygote.command_line(arguments, log=log, host=host)
        else:
            arguments = [launch.to_argument(), *arguments]
            self.running[name] = self.zygote.fork("faults.launcher:main", arguments, log=log, host=host)

    @property
    def processes(self) -> list[Process]:
        return list(self.running.values())

    @property
    def trainers(self) -> list[Process]:
        """Their launchers."""
        return [process for name, process in self.running.items() if name.startswith("trainer")]

    def reach(self, step: int) -> None:
        """Waits until training is at `step` or over. Raises `RuntimeError` if it stands still or a worker ends."""

        def reached() -> bool:
            self.progress.look()
            return self.progress.step >= step or not any(one.alive for one in self.trainers)

        before = -1
        while not reached():
            if self.progress.step == before:
                raise RuntimeError(f"training stands still at step {before}: {self.ends_of_logs()}")
            before = self.progress.step
            happens(lambda: reached() or self.progress.step > before, within=RECONNECT_DEADLINE)  # noqa: B023

    def finish(self) -> dict[str, int | None]:
        """Waits for the end of training, then ends the rest by SIGTERM; exit codes of all that ran, by worker."""
        for process in self.trainers:
            process.ends(RECONNECT_DEADLINE)
        others = [name for name in self.running if not name.startswith("trainer")]
        for name in sorted(others, key=lambda name: name == REGISTRY):
            self.running[name].send(signal.SIGTERM)
            self.running[name].ends(_END_SECONDS)
        return {name: process.poll() for name, process in self.running.items()}

    def lose(self, host: Host) -> None:
        """Kills everything on a host."""
        for name in [name for name in self.running if self.places[name] is host]:
            process = self.running.pop(name)
            process.kill()
            process.ends(_END_SECONDS)

    def ends_of_logs(self) -> str:
        return "\n".join(f"{name}: {process.end_of_log()}" for name, process in self.running.items())
