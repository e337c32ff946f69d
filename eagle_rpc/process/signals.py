"""How signals end a process: with its launcher, or on SIGTERM and SIGINT."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from eagle_rpc.errors import ConnectionLost, NameTaken, TargetUnavailable, WaitTimeout

logger = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], object] | signal.Handlers

_PR_SET_PDEATHSIG = 1
_STOPPING = (signal.SIGTERM, signal.SIGINT)


def die_with_parent() -> None:
    """Asks the kernel to send SIGTERM when the parent process ends. Does nothing except on Linux.

    Without it workers would outlive a launcher that is killed.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have ended before the request.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def on_interrupt(handler: Handler) -> Iterator[None]:
    """Handles Ctrl-C by `handler` while the body runs. If it is ignored, as in a shell's background, it stays so.

    With `signal.SIG_DFL` it ends the process at once. Python's own handler raises, and what is raised inside a
    `__del__`, as while modules load, is lost. Only for the main thread.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yields an event that the first SIGTERM or SIGINT sets; a second one exits with code 128 + its number.

    Only for the main thread. A thread of its own reads the signals, so they count while the main thread is
    inside torch.
    """
    stop = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_listen, args=(reader, stop), name="signals", daemon=True).start()
    handlers = {number: signal.signal(number, _do_nothing) for number in _STOPPING}
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # The thread ends with the pipe.
        os.close(writer)


@contextlib.contextmanager
def tolerate_stop(stop: threading.Event) -> Iterator[None]:
    """Logs a failed wait instead of raising it, if `stop` was set and so ended it. Other errors pass."""
    try:
        yield
    except (ConnectionLost, NameTaken, TargetUnavailable, WaitTimeout) as error:
        if not stop.is_set():
            raise
        logger.warning("stopped while it waited: %s", error)


def _do_nothing(_number: int, _frame: object) -> None:
    """Python writes the number of a signal into the wake-up pipe only if the signal has a handler."""


def _listen(reader: int, stop: threading.Event) -> None:
    with open(reader, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in _STOPPING:
                continue
            if stop.is_set():
                os._exit(128 + number[0])
            stop.set()
