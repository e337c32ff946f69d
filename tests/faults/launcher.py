"""torchrun's work for the workers of one host, in a process that has imported everything: it forks them in no
time.

Like torchrun it gives each worker its environment, forwards SIGTERM and SIGINT, and waits. Its exit code is
the largest of theirs, as a shell reports them. If it is killed, its workers go on without it.
"""

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from types import FrameType

from support.processes import torchrun_environment

from eagle_rpc.__main__ import main as command_line

_FORWARDED = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The workers of one host: `count` of a job's `size`, from rank `first` on; the job's store."""

    size: int
    count: int
    first: int = 0
    address: str = "127.0.0.1"
    port: int

    def to_argument(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    """Arguments: a `Launch`, and the arguments of `python -m eagle_rpc`."""
    launch = Launch(**json.loads(sys.argv[1]))
    arguments = sys.argv[2:]
    workers: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        for worker in workers:
            os.kill(worker, number)

    handlers = {number: signal.signal(number, forward) for number in _FORWARDED}
    # Signals wait until all workers are there.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    for rank in range(launch.first, launch.first + launch.count):
        worker = os.fork()
        if worker == 0:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
            os.setsid()
            os.environ.update(torchrun_environment(rank, **asdict(launch)))
            sys.argv[1:] = arguments
            command_line()
            return
        workers.append(worker)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
    print(f"workers ended with {codes}", flush=True)
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))
