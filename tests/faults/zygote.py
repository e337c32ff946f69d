"""A process that has imported everything and forks workers from then on: an import of torch and transformers takes seconds.

A forked worker is what `python -m` would have started: it runs the same entry with its own arguments, session, directory
and log. It is a child of the lab, not of the zygote, since its parent ends at once and the lab adopts orphans.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

MAX_ORDER_BYTES = 2**16
_PR_SET_PDEATHSIG = 1
# What the jobs and programs import, directly or on first use.
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
    environment: dict[str, str]
    directory: str
    log: str  # appended
    niceness: int


def main() -> None:
    lab = os.getppid()
    channel = socket.socket(fileno=int(sys.argv[1]))
    _preload()
    channel.send(b"ready")
    while message := channel.recv(MAX_ORDER_BYTES):
        order = Order(**json.loads(message))
        pid = _fork()
        if pid == 0:
            channel.close()
            _become(order, lab)
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


def _become(order: Order, lab: int) -> None:
    """Turns this process into the worker and runs it; `SystemExit` and errors pass through to the interpreter's own end."""
    os.setsid()
    while os.getppid() != lab:
        time.sleep(0.001)
    # Nothing outlives the lab; torchrun's workers ask for something else by themselves.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != lab:
        sys.exit("the lab has ended")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(order.niceness)
    os.chdir(order.directory)
    os.environ.update(order.environment)
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, standard)
    module, _, function = order.entry.partition(":")
    sys.argv = [str(Path(sys.executable)), *order.arguments]
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    main()
