"""The lab's processes: started by the zygote or by hand, watched, stopped, and looked for afterwards."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil

from faults.zygote import MAX_ORDER_BYTES, Order

_BENCHMARKS = Path(__file__).parents[1]
_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.02
_START_TIMEOUT = 120.0


class Process:
    """A child of the lab. Times are of time.monotonic."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self.started = time.monotonic()
        self.ended: float | None = None
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, minus the signal's number if one ended it; None while it lives."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
                self.ended = time.monotonic()
        return self._code

    @property
    def alive(self) -> bool:
        return self.poll() is None

    def send(self, number: int) -> None:
        """A signal; none if it has ended."""
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def usage(self) -> tuple[int, int, int]:
        """Resident bytes, those of them that no file stands behind, and open descriptors."""
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
        )
        resident, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
        return resident, anonymous, len(os.listdir(f"/proc/{self.pid}/fd"))

    def end_of_log(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Zygote:
    """Forks workers of this package and of the lab within milliseconds. Entering starts it, leaving ends it."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._directory = directory
        self._environment = environment

    def __enter__(self) -> "Zygote":
        # Orphans become our children: workers on purpose, leftovers to be seen.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, (self._directory / "zygote.log").open("w") as log:
            command = [sys.executable, "-m", "faults.zygote", str(theirs.fileno())]
            environment = {**os.environ, **self._environment}
            self._popen = subprocess.Popen(
                command,
                cwd=_BENCHMARKS,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._channel.settimeout(_START_TIMEOUT)
        if self._channel.recv(MAX_ORDER_BYTES) != b"ready":
            raise RuntimeError(f"the zygote did not start: {(self._directory / 'zygote.log').read_text()}")
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._popen.wait(10)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def fork(
        self,
        entry: str,
        arguments: list[str],
        *,
        log: Path,
        directory: Path | None = None,
        environment: dict[str, str] | None = None,
        niceness: int = 0,
    ) -> Process:
        """Starts `module:function` with these arguments; its output is appended to `log`."""
        order = Order(
            entry=entry,
            arguments=arguments,
            environment=environment or {},
            directory=str(directory or self._directory),
            log=str(log),
            niceness=niceness,
        )
        log.touch()
        self._channel.send(json.dumps(asdict(order)).encode())
        return Process(int(self._channel.recv(MAX_ORDER_BYTES)), log)

    def command_line(self, arguments: list[str], *, log: Path, **settings: object) -> Process:
        """`python -m eagle_rpc ARGUMENTS`"""
        return self.fork("eagle_rpc.__main__:main", arguments, log=log, **settings)


def wait_until(
    holds: Callable[[], bool], seconds: float, meanwhile: Callable[[], None] = lambda: None
) -> bool:
    """Whether `holds` came true in time; `meanwhile` is called between two looks."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() >= deadline:
            return False
        meanwhile()
        time.sleep(_POLL_SECONDS)
    return True


def descendants(*, without: set[int]) -> list[psutil.Process]:
    """Living processes that come from this one, except `without`; dead ones that nobody waited for are cleared."""
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
    """Kills what `processes` names when the body ends, however it ends."""
    try:
        yield
    finally:
        for process in processes():
            process.kill()
        wait_until(lambda: not any(process.alive for process in processes()), 10)
