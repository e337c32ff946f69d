"""A bound for calls of torch that have none: start and shutdown of RPC."""

import contextlib
import faulthandler
import logging
import os
import threading
from collections.abc import Iterator

logger = logging.getLogger(__name__)

EXIT_CODE = 70


@contextlib.contextmanager
def watchdog(seconds: float, what: str) -> Iterator[None]:
    """Exits with code 70 and the stack of every thread if the body, called `what`, takes over `seconds`."""
    timer = threading.Timer(seconds, _give_up, (seconds, what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(seconds: float, what: str) -> None:
    logger.critical("%s did not end within %.0f s; ending the process", what, seconds)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_CODE)
