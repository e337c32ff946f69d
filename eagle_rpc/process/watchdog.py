"""An end for what torch may never end: start-up and shutdown of RPC have no bound of their own."""

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
    """Ends the process with code 70 and every thread's stack if the body takes longer than `seconds`."""
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
