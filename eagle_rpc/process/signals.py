"""How a process ends: with its launcher, or when it is told to."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
_STOPPING = (signal.SIGTERM, signal.SIGINT)


def die_with_parent() -> None:
    """Asks the kernel for SIGTERM when the parent process ends; Linux only, elsewhere does nothing.

    Workers would otherwise outlive a launcher that is killed. The parent may have ended before the request was made, so
    that is looked at afterwards.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; a second one ends the process at once with code 128 + its number.

    For the main thread. Signals are read by a thread of their own, so they are heard while the main thread is inside torch.
    """
    stop = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_hear, args=(reader, stop), name="signals", daemon=True).start()
    handlers = {number: signal.signal(number, _unheard) for number in _STOPPING}
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # The thread ends with the pipe.
        os.close(writer)


def _unheard(_number: int, _frame: object) -> None:
    """Python writes a signal's number into the wake-up pipe only if it has a handler for it."""


def _hear(reader: int, stop: threading.Event) -> None:
    with open(reader, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in _STOPPING:
                continue
            if stop.is_set():
                os._exit(128 + number[0])
            stop.set()
