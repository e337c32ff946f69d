"""The processes of a benchmark, which `tests/support/processes.py` starts, asks and ends as it does those of
tests.

Benchmarks import this module instead of `support`: it puts `tests/` on the path.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support.processes import Command, Process, free_port, torchrun_environment

__all__ = ["Command", "Process", "free_port", "python_module", "running", "static_job"]

_BENCHMARKS = Path(__file__).parent
# Seconds: to start a service and its client, and to end after SIGTERM.
_START_TIMEOUT, _END_TIMEOUT = 600.0, 60.0
# One thread each; large pages, which this package asks for itself, for the peer too.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def python_module(
    name: str,
    *arguments: str,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    answers: bool = False,
) -> Command:
    """`python -m ARGUMENTS`, called `name`."""
    return Command(name, [python, "-m", *arguments], {**_ENVIRONMENT, **(environment or {})}, answers)


def static_job(
    module: str,
    *arguments: str,
    threads: int = 1,
    target_answers: bool = False,
    targets: int = 1,
    trainers: int = 1,
) -> list[Command]:
    """Targets and trainers of a static job, `python -m MODULE ROLE ARGUMENTS`, as torchrun would start them."""
    port, roles = free_port(), ["target"] * targets + ["trainer"] * trainers
    commands = []
    for rank, role in enumerate(roles):
        environment = {**torchrun_environment(rank, len(roles), port), "OMP_NUM_THREADS": str(threads)}
        name = f"{role}{rank - targets * (role == 'trainer')}"
        answers = target_answers or role == "trainer"
        command = python_module(name, module, role, *arguments, environment=environment, answers=answers)
        commands.append(command)
    return commands


@contextlib.contextmanager
def running(
    servers: list[Command], client: Command, logs: Path, *, start_timeout: float = _START_TIMEOUT
) -> Iterator[tuple[list[Process], Process]]:
    """The processes of the servers and of the client, which has said that it is ready."""
    with contextlib.ExitStack() as stack:
        processes = []
        for command in (*servers, client):
            process = command.start(log=logs / f"{command.name}.log", directory=_BENCHMARKS)
            stack.callback(process.end, _END_TIMEOUT)
            processes.append(process)
        # All before any is waited for: workers of one job wait for each other when they end.
        stack.callback(lambda: [process.hang_up() for process in processes])
        processes[-1].answer(start_timeout)
        yield processes[:-1], processes[-1]
