"""Jobs in child processes: their command lines, and runs of one that are bounded and leave their output in a file."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from eagle_rpc.process.environment import outside_torchrun
from eagle_rpc.process.signals import die_with_parent
from eagle_rpc.process.waiting import BoundedWait

_POLL_SECONDS = 0.2
# torchrun gives workers 30 seconds; a trainer among them writes a checkpoint.
_END_SECONDS = 120.0


def job_command(words: Sequence[str], *, num_workers: int | None = None) -> list[str]:
    """The command line `eagle_rpc WORDS`: in one process, or `num_workers` under a torchrun of this host."""
    launcher = ["-m", "eagle_rpc.process.launcher", "--standalone", f"--nproc-per-node={num_workers}"]
    return [sys.executable, *(launcher if num_workers is not None else ()), "-m", "eagle_rpc", *words]


def run_child(command: Sequence[str], what: str, *, log: Path, seconds: float, stop: threading.Event) -> int:
    """Runs a command with its output at the end of `log`; returns its exit code. `what` names it in errors.

    If `stop` is set, or after `seconds`, the child is told to end as by SIGTERM, and is killed if it does not
    within two minutes. It also ends if this process does. Raises `WaitTimeout` after `seconds`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=outside_torchrun(),
            # Ctrl-C reaches this process alone, which tells the child once: twice would end it without a checkpoint.
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    wait = BoundedWait(what, seconds)
    try:
        while child.poll() is None and not stop.is_set() and not wait.over:
            stop.wait(_POLL_SECONDS)
        over = child.poll() is None and not stop.is_set()
    finally:
        _end(child)
    if over:
        raise wait.timeout(f"see {log}")
    assert child.returncode is not None
    return child.returncode


def _end(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is not None:
        return
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
