"""Processes of tests, fault tests and benchmarks: how they are started, watched, asked and ended.

Tests and fault tests have `tests/` on their path; benchmarks put it there in `benchmarks/processes.py`.
"""

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.waiting import happens

# Below the ports that Linux gives to outgoing connections: none of those takes a port before its listener
# does.
_PORTS = range(20000, 32000)
_DRAW = random.SystemRandom()
# In which a process ends after SIGKILL.
_KILL_SECONDS = 60.0


def free_ports(count: int) -> list[int]:
    """TCP ports of loopback on which nothing listens, all different."""
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(ports) < count:
            port = _DRAW.choice(_PORTS)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.append(port)
    return ports


def free_port() -> int:
    return free_ports(1)[0]


def torchrun_environment(
    rank: int, size: int, port: int, *, address: str = "127.0.0.1", first: int = 0, count: int | None = None
) -> dict[str, str]:
    """The variables that torchrun sets for worker `rank` of a job of `size` workers, whose store is at `address`.

    Its host has `count` of the workers (None: all), from rank `first` on.
    """
    count = size if count is None else count
    return {
        **dict.fromkeys(("RANK", "ROLE_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "ROLE_WORLD_SIZE"), str(size)),
        **{"LOCAL_RANK": str(rank - first), "LOCAL_WORLD_SIZE": str(count)},
        **{"ROLE_NAME": "default", "GROUP_WORLD_SIZE": str(-(-size // count))},
        **{"MASTER_ADDR": address, "MASTER_PORT": str(port)},
        **{"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"},
        **{"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "False"},
    }


@dataclass(frozen=True)
class Command:
    """A process to start. If it `answers`, it takes lines of JSON on stdin and says a line of JSON for each."""

    name: str
    argv: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # beside that of this process
    answers: bool = False

    def start(self, *, log: Path, directory: Path) -> "Process":
        """Its output goes to the end of `log`: errors only, if it answers on stdout."""
        with log.open("a") as output:
            popen = subprocess.Popen(
                self.argv,
                cwd=directory,
                env={**os.environ, **self.environment},
                stdin=subprocess.PIPE if self.answers else subprocess.DEVNULL,
                stdout=subprocess.PIPE if self.answers else output,
                stderr=output,
                text=True,
            )
        return Process(popen.pid, log, name=self.name, popen=popen)


class Process:
    """A child of this process. Times are of time.monotonic."""

    def __init__(
        self, pid: int, log: Path, *, name: str = "process", popen: subprocess.Popen[str] | None = None
    ) -> None:
        self.pid = pid
        self.log = log
        self.name = name
        self.started = time.monotonic()
        # Kept: a forgotten Popen would collect the exit code.
        self._popen = popen
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, minus the signal's number if one ended it; None while it lives."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
                if self._popen is not None:
                    self._popen.returncode = self._code
        return self._code

    @property
    def alive(self) -> bool:
        return self.poll() is None

    def ends(self, within: float, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Whether it ends in `within` seconds."""
        return happens(lambda: not self.alive, within=within, meanwhile=meanwhile)

    def send(self, number: int) -> None:
        """Sends a signal; does nothing if the process has ended."""
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def end(self, within: float) -> None:
        """Closes the stdin of a process that answers, sends SIGTERM to another one, and kills either after
        `within` seconds.
        """
        if not self.hang_up():
            self.send(signal.SIGTERM)
        if not self.ends(within):
            self.kill()
            self.ends(_KILL_SECONDS)

    def hang_up(self) -> bool:
        """Closes the stdin of a process that answers, which then ends by itself; whether it is one."""
        answers = self._popen is not None and self._popen.stdin is not None
        if answers:
            self._popen.stdin.close()
        return answers

    def ask(self, *, seconds: float = 300.0, **question: Any) -> dict[str, Any]:
        """Sends a question and returns the answer. Raises as `answer` does."""
        self.tell(**question)
        return self.answer(seconds)

    def tell(self, **question: Any) -> None:
        """Sends a question, whose answer `answer` returns: so several processes work on theirs at a time."""
        assert self._popen is not None and self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(question) + "\n")
        self._popen.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next line that it says. Raises `RuntimeError` with the end of its log if there is none in `seconds`."""
        assert self._popen is not None and self._popen.stdout is not None
        readable, _, _ = select.select([self._popen.stdout], [], [], seconds)
        line = self._popen.stdout.readline() if readable else ""
        if not line:
            how = "ended" if readable else f"did not answer within {seconds:.0f} s"
            raise RuntimeError(f"the {self.name} {how}; its log ends:\n{self.end_of_log(40)}")
        return json.loads(line)

    def cpu_seconds(self) -> float:
        """User and system time since the start."""
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def usage(self) -> tuple[int, int, int, int]:
        """Resident bytes, those of them that belong to no file, and the numbers of open descriptors and of threads."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        resident, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
        return resident, anonymous, len(os.listdir(f"/proc/{self.pid}/fd")), int(fields["Threads"])

    def end_of_log(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def descendants(*, without: set[int]) -> list[psutil.Process]:
    """Living descendants of this process, except `without`. Collects the exit codes of dead ones."""
    living = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid in without:
                continue
            if process.status() == psutil.STATUS_ZOMBIE:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
            else:
                living.append(process)
    return living


@contextlib.contextmanager
def ended_at_last(processes: Callable[[], list[Process]]) -> Iterator[None]:
    """Kills all of `processes()` when the body ends, with or without an exception."""
    try:
        yield
    finally:
        for process in processes():
            process.kill()
        for process in processes():
            process.ends(_KILL_SECONDS)
