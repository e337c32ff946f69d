"""What a worker's errors mean once it has been told to stop."""

import logging
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
