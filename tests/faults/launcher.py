"""What torchrun does for the workers of one host, from a process that has imported everything: a fork each instead of seconds.

As torchrun it hands them their places in the environment, passes SIGTERM and SIGINT on, and waits. Its exit code is the
worst of theirs, as a shell would tell it. If it is killed, they are on their own.
"""

import os
import signal
import sys
from types import FrameType

from eagle_rpc.__main__ import main as command_line

_PASSED_ON = (signal.SIGTERM, signal.SIGINT)


def main() -> None:
    """Arguments: the number of workers, a free port, and what `python -m eagle_rpc` takes."""
    size, port, *arguments = sys.argv[1:]
    workers: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for worker in workers:
            os.kill(worker, number)

    handlers = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    for rank in range(int(size)):
        # Signals that come before all are there wait until they are.
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        worker = os.fork()
        if worker == 0:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
            os.setsid()
            os.environ.update(place(rank, int(size), port))
            sys.argv[1:] = arguments
            command_line()
            return
        workers.append(worker)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
    print(f"workers ended with {codes}", flush=True)
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))


def place(rank: int, size: int, port: str) -> dict[str, str]:
    """torchrun's variables."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(size),
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "cycles",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
