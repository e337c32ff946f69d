"""A process that has imported everything and then forks workers: an import of torch and transformers takes
seconds.

A forked worker runs as `python -m` would have started it: with its own arguments, session, directory and log.
It is a child of the fault test and not of the zygote: its parent ends at once, and the fault test adopts
orphans.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from support.hosts import Host, enter
from support.processes import Process

_TESTS = Path(__file__).parents[1]
_MAX_ORDER_BYTES = 2**16
# Seconds: for the imports, and for the end of a process that has imported them.
_START_TIMEOUT, _END_TIMEOUT = 120.0, 60.0
# Options of prctl(2).
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# The imports of all jobs, direct and on first use.
_PRELOADED = (
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "eagle_rpc.__main__",
    "eagle_rpc.jobs.registry",
    "eagle_rpc.jobs.serve",
    "eagle_rpc.jobs.train",
    "eagle_rpc.jobs.status",
)


@dataclass(frozen=True, kw_only=True)
class Order:
    """A worker to fork."""

    entry: str  # "module:function"
    arguments: list[str]  # sys.argv[1:]
    directory: str
    log: str  # appended
    niceness: int
    holder: int  # of the host that it runs on (support/hosts.py); 0: this one


class Zygote:
    """Starts the zygote on entering and ends it on leaving; in between it forks workers within milliseconds."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._directory = directory
        self._environment = environment

    def __enter__(self) -> "Zygote":
        # Orphans become our children: workers, and processes that a worker left behind.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, (self._directory / "zygote.log").open("w") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "faults.zygote", str(theirs.fileno())],
                cwd=_TESTS,
                env={**os.environ, **self._environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._channel.settimeout(_START_TIMEOUT)
        if self._channel.recv(_MAX_ORDER_BYTES) != b"ready":
            raise RuntimeError(f"the zygote did not start: {(self._directory / 'zygote.log').read_text()}")
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._popen.wait(_END_TIMEOUT)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def fork(
        self, entry: str, arguments: list[str], *, log: Path, niceness: int = 0, host: Host | None = None
    ) -> Process:
        """Starts `module:function` with these arguments on `host`; its output goes to the end of `log`."""
        order = Order(
            entry=entry,
            arguments=arguments,
            directory=str(self._directory),
            log=str(log),
            niceness=niceness,
            holder=host.holder.pid if host else 0,
        )
        log.touch()
        self._channel.send(json.dumps(asdict(order)).encode())
        return Process(int(self._channel.recv(_MAX_ORDER_BYTES)), log, name=entry)

    def command_line(
        self, arguments: list[str], *, log: Path, niceness: int = 0, host: Host | None = None
    ) -> Process:
        """Starts `python -m eagle_rpc ARGUMENTS` on `host`."""
        return self.fork("eagle_rpc.__main__:main", arguments, log=log, niceness=niceness, host=host)


# --- the zygote's own process


def main() -> None:
    starter = os.getppid()
    channel = socket.socket(fileno=int(sys.argv[1]))
    _preload()
    channel.send(b"ready")
    while message := channel.recv(_MAX_ORDER_BYTES):
        pid = _fork()
        if pid == 0:
            channel.close()
            _become(Order(**json.loads(message)), starter)
            return
        channel.send(str(pid).encode())


def _preload() -> None:
    from eagle_rpc.process import prepare_environment

    prepare_environment()
    import torch

    torch.set_num_threads(1)
    for module in _PRELOADED:
        importlib.import_module(module)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"a process that forks must have one thread, this one has {threads}")


def _fork() -> int:
    """Forks twice; 0 in the grandchild, its process id here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild:
            os.write(writer, str(grandchild).encode())
            os._exit(0)
        os.close(reader)
        os.close(writer)
        return 0
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as answer:
        return int(answer.read())


def _become(order: Order, starter: int) -> None:
    """Turns this process into the worker and runs it; `SystemExit` and errors reach the interpreter."""
    os.setsid()
    while os.getppid() != starter:
        time.sleep(0.001)
    # No worker lives longer than the fault test. torchrun's workers ask for another signal themselves.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != starter:
        sys.exit("the fault test has ended")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(order.niceness)
    if order.holder:
        enter(order.holder)
    os.chdir(order.directory)
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, standard)
    module, _, function = order.entry.partition(":")
    sys.argv = [str(Path(sys.executable)), *order.arguments]
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    main()
