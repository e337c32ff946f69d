"""torchrun with a short end: `python -m eagle_rpc.process.launcher TORCHRUN_ARGUMENTS`.

torchrun ends a failed job with a traceback of its own and a table of all workers, below which the reason is
hard to find. This program ends with the reason of the worker that failed first. Imports torch.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun


def main() -> None:
    """Runs torchrun; exits with its code, or with 1 and the reason as the last lines of stderr."""
    # They say that workers are ended, which the reason explains better.
    logging.disable(logging.ERROR)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        sys.exit(_reason(error))
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


def _reason(error: ChildFailedError) -> str:
    failures = sorted(error.failures.values(), key=_seconds)
    for failure in failures:
        if isinstance(failure.message, dict):
            return f"launch: {failure.message['message']}"
    first = failures[0]
    how = f"by {first.signal_name()}" if first.exitcode < 0 else f"with code {first.exitcode}"
    return f"launch: worker {first.local_rank} (process {first.pid}) was ended {how} before it could say why"


def _seconds(failure: ProcessFailure) -> float:
    """The time of a failure. torch knows whole seconds, in which several workers may fail."""
    data = failure.error_file_data
    return float(data.get("seconds", failure.timestamp)) if isinstance(data, dict) else failure.timestamp


if __name__ == "__main__":
    main()
