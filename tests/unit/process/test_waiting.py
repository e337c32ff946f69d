"""Waits have a bound and say what they wait for."""

import logging
import threading

import pytest

from eagle_rpc.errors import WaitTimeout
from eagle_rpc.process.waiting import BoundedWait, wait_until


def test_a_wait_logs_after_a_second_and_then_every_ten(caplog):
    now = [0.0]
    with caplog.at_level(logging.INFO):
        wait = BoundedWait("target0", 60, clock=lambda: now[0])
        for now[0] in (0.9, 1.0, 5.0, 10.9, 11.0, 20.0):
            wait.say("it loads its model")
    lines = [f"waiting for target0, {seconds} of 60 s: it loads its model" for seconds in (1, 11)]
    assert caplog.messages == lines


def test_the_bound_raises_with_what_was_waited_for():
    with pytest.raises(WaitTimeout, match=r"waiting for the registry, \d+ of 0 s: nobody answers"):
        wait_until(
            lambda: False,
            "the registry",
            seconds=0.01,
            stop=threading.Event(),
            pause=0.001,
            why=lambda: "nobody answers",
        )


def test_a_wait_ends_when_the_worker_is_told_to_stop():
    stop = threading.Event()
    stop.set()
    assert not wait_until(lambda: False, "the registry", seconds=60, stop=stop)
    assert wait_until(lambda: True, "the registry", seconds=60, stop=stop)
