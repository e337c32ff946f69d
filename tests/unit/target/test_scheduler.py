import threading
import time

import pytest
import torch

from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision import Failure, Ok
from eagle_rpc.target.scheduler import ForwardScheduler, is_out_of_memory

WAIT = 20.0


def soon():
    return time.monotonic() + WAIT


class Gate:
    """Work that says when it has started and goes on when told."""

    def __init__(self):
        self.started, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.started.set()
        assert self.opened.wait(WAIT)
        return "gate"


@pytest.fixture
def scheduler():
    made = ForwardScheduler(max_queued=4)
    yield made
    assert made.stop(WAIT)


@pytest.fixture
def gate(scheduler):
    """The forward thread is busy until the gate opens."""
    gate = Gate()
    scheduler.submit(gate, session="gate", deadline=soon())
    assert gate.started.wait(WAIT)
    yield gate
    gate.opened.set()


def test_work_is_answered_with_its_value(scheduler):
    assert scheduler.submit(lambda: 7, session="a", deadline=soon()).wait() == Ok(7)
    assert scheduler.drain(WAIT)
    assert scheduler.stats() == {"queued": 0, "ok": 1}


def test_one_thread_runs_everything(scheduler):
    threads = [scheduler.submit(threading.get_ident, session=s, deadline=soon()).wait().value for s in "ab"]
    assert threads[0] == threads[1] != threading.get_ident()


def test_a_full_queue_is_busy_and_takes_work_again_later(scheduler, gate):
    waiting = [scheduler.submit(lambda: 1, session="a", deadline=soon()) for _ in range(4)]
    refused = scheduler.submit(lambda: 1, session="b", deadline=soon()).wait()
    assert refused == Failure("busy", "the target's queue must hold at most 4 requests (target.max_queued_requests)")
    gate.opened.set()
    assert [future.wait() for future in waiting] == [Ok(1)] * 4
    assert scheduler.submit(lambda: 2, session="b", deadline=soon()).wait() == Ok(2)
    assert scheduler.stats()["busy"] == 1


def test_expired_work_is_not_run(scheduler, gate):
    ran = []
    late = scheduler.submit(lambda: ran.append("late"), session="a", deadline=time.monotonic())
    timely = scheduler.submit(lambda: ran.append("timely"), session="a", deadline=soon())
    gate.opened.set()
    assert late.wait().code == "expired"
    assert timely.wait() == Ok(None)
    assert ran == ["timely"]


def test_sessions_take_turns(scheduler, gate):
    order = []
    futures = [
        scheduler.submit(lambda name=name: order.append(name), session=name[0], deadline=soon())
        for name in ("a1", "a2", "a3", "b1")
    ]
    gate.opened.set()
    for future in futures:
        future.wait()
    assert order == ["a1", "b1", "a2", "a3"]


def test_drain_waits_for_the_work_under_way(scheduler, gate):
    assert not scheduler.drain(0.0)
    gate.opened.set()
    assert scheduler.drain(WAIT)


def test_drain_finishes_the_queue_and_refuses_new_work(scheduler, gate):
    waiting = scheduler.submit(lambda: 1, session="a", deadline=soon())
    assert not scheduler.drain(0.0)
    assert scheduler.submit(lambda: 2, session="a", deadline=soon()).wait().code == "draining"
    gate.opened.set()
    assert scheduler.drain(WAIT)
    assert waiting.done()
    assert waiting.wait() == Ok(1)


def test_stop_answers_what_waits(gate, scheduler):
    waiting = scheduler.submit(lambda: 1, session="a", deadline=soon())
    assert not scheduler.stop(0.0)
    assert waiting.wait().code == "draining"
    gate.opened.set()
    assert scheduler.stop(WAIT)
    assert scheduler.submit(lambda: 2, session="a", deadline=soon()).wait().code == "draining"


def test_a_dropped_session_leaves_the_others(scheduler, gate):
    gone = scheduler.submit(lambda: 1, session="a", deadline=soon())
    stays = scheduler.submit(lambda: 2, session="b", deadline=soon())
    scheduler.drop_session("a")
    scheduler.drop_session("nobody")
    assert gone.wait().code == "unknown_session"
    gate.opened.set()
    assert stays.wait() == Ok(2)


def raises(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "out_of_memory"),
        (InvalidRequest("why"), "invalid_request"),
        (KeyError("layer"), "failed"),
        (StopIteration(), "failed"),
    ],
)
def test_whatever_work_raises_is_a_typed_failure_and_the_thread_lives(scheduler, error, code):
    assert scheduler.submit(raises(error), session="a", deadline=soon()).wait().code == code
    assert scheduler.submit(lambda: 1, session="a", deadline=soon()).wait() == Ok(1)
    assert scheduler.drain(WAIT)
    assert scheduler.stats() == {"queued": 0, code: 1, "ok": 1}


def test_an_unforeseen_failure_names_itself_and_is_logged_with_its_traceback(scheduler, caplog):
    reply = scheduler.submit(raises(KeyError("layer")), session="a", deadline=soon()).wait()
    assert reply == Failure("failed", "KeyError: 'layer'")
    assert caplog.records[-1].exc_info


def test_the_cpu_allocator_is_understood_for_real():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
