"""Starting, asking, measuring and ending the processes of one side of a comparison."""

import contextlib
import json
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# `python -m peers...` is found from here.
_BENCHMARKS = Path(__file__).parents[1]
# Seconds: to start a service and its client, to answer one command, to end after being told to.
_START_TIMEOUT, _ANSWER_TIMEOUT, _END_TIMEOUT = 120.0, 300.0, 20.0
# One thread each; large pages, which this package asks for itself, for the peer too.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Command:
    """A process to start."""

    name: str
    argv: list[str]
    environment: dict[str, str]
    answers: bool  # a client, which answers commands in lines


class Process:
    """A started command. Its log is shown if it fails."""

    def __init__(self, command: Command, log: Path) -> None:
        self.name = command.name
        self._log = log
        with log.open("w") as output:
            self._popen = subprocess.Popen(
                command.argv,
                cwd=_BENCHMARKS,
                env={**os.environ, **_ENVIRONMENT, **command.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if command.answers else output,
                stderr=output,
                text=True,
            )
        self._usage = psutil.Process(self._popen.pid)

    def cpu_seconds(self) -> float:
        """User and system time since the start."""
        times = self._usage.cpu_times()
        return times.user + times.system

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends a client one command and waits for its answer; raises `RuntimeError` with the end of its log if there is none."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(command) + "\n")
        self._popen.stdin.flush()
        return self.answer(_ANSWER_TIMEOUT)

    def answer(self, timeout: float) -> dict[str, Any]:
        """The next line that a client says, within `timeout` seconds."""
        assert self._popen.stdout is not None
        readable, _, _ = select.select([self._popen.stdout], [], [], timeout)
        line = self._popen.stdout.readline() if readable else ""
        if not line:
            how = "ended" if readable else f"did not answer within {timeout:.0f} s"
            raise RuntimeError(f"the {self.name} {how}; its log ends:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)

    def end(self) -> None:
        """A client ends when its stdin does, a server when it is told to; either is killed if it does not."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        if self._popen.stdout is None:
            self._popen.terminate()
        try:
            self._popen.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


def static_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a worker of a job on this host, for a job without torchrun's own process."""
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(size)),
        **{
            "ROLE_NAME": "default",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        },
        **{"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"},
        **{"TORCHELASTIC_RUN_ID": "benchmark", "TORCHELASTIC_USE_AGENT_STORE": "False"},
    }


@contextlib.contextmanager
def running(
    servers: list[Command], client: Command, logs: Path, *, start_timeout: float = _START_TIMEOUT
) -> Iterator[tuple[list[Process], Process]]:
    """The servers and the client, which is ready."""
    with contextlib.ExitStack() as stack:
        processes = []
        for command in (*servers, client):
            processes.append(Process(command, logs / f"{command.name}.log"))
            stack.callback(processes[-1].end)
        processes[-1].answer(start_timeout)
        yield processes[:-1], processes[-1]
