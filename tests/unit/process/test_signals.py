"""What signals do, and what errors mean once a worker has been told to stop."""

import logging
import signal
import subprocess
import sys
import threading

import pytest

from eagle_rpc.errors import CheckpointError, ConnectionLost, TrainingDiverged, WaitTimeout
from eagle_rpc.process import tolerate_stop


def told_to_stop() -> threading.Event:
    stop = threading.Event()
    stop.set()
    return stop


@pytest.mark.parametrize("error", [WaitTimeout("too late"), ConnectionLost("gone")])
def test_a_wait_that_ends_with_the_worker_is_no_error(error, caplog):
    with caplog.at_level(logging.WARNING), tolerate_stop(told_to_stop()):
        raise error
    assert f"stopped while it waited: {error}" in caplog.text


@pytest.mark.parametrize(
    "error", [TrainingDiverged("the weights must be finite"), CheckpointError("no room on the disk")]
)
def test_what_loses_work_is_an_error_also_at_the_end(error):
    with pytest.raises(type(error)), tolerate_stop(told_to_stop()):
        raise error


def test_a_wait_that_fails_by_itself_is_an_error():
    with pytest.raises(WaitTimeout), tolerate_stop(threading.Event()):
        raise WaitTimeout("too late")


# Python runs its own handler of Ctrl-C inside the `__del__`, where what it raises is lost.
INTERRUPTED = """
import os, signal
from eagle_rpc.process.signals import on_interrupt

class Interrupts:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, {before})
with on_interrupt(signal.SIG_DFL):
    Interrupts()
    print("goes on")
"""


@pytest.mark.parametrize(
    ("before", "code", "output"),
    [("signal.default_int_handler", -signal.SIGINT, ""), ("signal.SIG_IGN", 0, "goes on\n")],
)
def test_an_interrupt_while_modules_load_ends_the_process_unless_it_is_ignored(before, code, output):
    command = [sys.executable, "-c", INTERRUPTED.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, output)
