import gc
import threading
import weakref

import pytest
import torch
from scheduler_calls import OneByOne, scheduler_of, submit
from server_calls import WAIT

from eagle_rpc.errors import InvalidRequest, TargetBusy, TargetDraining, TargetFailed, UnknownSession
from eagle_rpc.service.forward_pass import is_out_of_memory


class Gate:
    """Work that says when it has started and goes on when told."""

    def __init__(self):
        self.started, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.started.set()
        assert self.opened.wait(WAIT)
        return "gate"


@pytest.fixture
def scheduler(clock):
    made = scheduler_of(OneByOne(), clock, max_queued_requests=4, max_queued_per_session=4)
    yield made
    assert made.stop(WAIT)


@pytest.fixture
def gate(scheduler):
    """The forward thread is busy until the gate opens."""
    gate = Gate()
    submit(scheduler, gate, session="gate")
    assert gate.started.wait(WAIT)
    yield gate
    gate.opened.set()


def test_work_is_answered_with_its_value_which_is_recorded_first(scheduler):
    order = []
    future = submit(scheduler, lambda: order.append("run") or 7, record=order.append)
    assert future.result(WAIT) == 7
    assert order == ["run", 7]
    assert scheduler.drain(WAIT)


def test_one_thread_runs_everything(scheduler):
    threads = [submit(scheduler, threading.get_ident, session=session).result(WAIT) for session in "ab"]
    threads.append(scheduler.submit_first(threading.get_ident).result(WAIT))
    assert len(set(threads)) == 1 and threads[0] != threading.get_ident()


def test_a_full_queue_is_busy_and_takes_work_again_later(scheduler, gate):
    waiting = [submit(scheduler, lambda: 1) for _ in range(4)]
    assert scheduler.num_queued == 4
    with pytest.raises(TargetBusy, match=r"must hold at most 4 requests \(target.max_queued_requests\)"):
        submit(scheduler, lambda: 1, session="b")
    gate.opened.set()
    assert [future.result(WAIT) for future in waiting] == [1] * 4
    assert submit(scheduler, lambda: 2, session="b").result(WAIT) == 2


def test_a_session_has_credits_and_the_running_request_takes_one(clock):
    scheduler = scheduler_of(OneByOne(), clock, max_queued_requests=9, max_queued_per_session=2)
    gate = Gate()
    submit(scheduler, gate, session="a")
    assert gate.started.wait(WAIT)
    waiting = submit(scheduler, lambda: 1, session="a")
    with pytest.raises(TargetBusy, match=r"at most 2 requests under way \(target.max_queued_per_session\)"):
        submit(scheduler, lambda: 1, session="a")
    other = submit(scheduler, lambda: 2, session="b")
    gate.opened.set()
    assert (waiting.result(WAIT), other.result(WAIT)) == (1, 2)
    assert submit(scheduler, lambda: 3, session="a").result(WAIT) == 3
    assert scheduler.stop(WAIT)


def test_a_run_among_others_leaves_them_their_share_of_the_queue(scheduler, gate):
    for _ in range(2):
        submit(scheduler, lambda: 1, run="greedy")
    with pytest.raises(TargetBusy, match="each of 2 runs must have at most 2 of 4 requests queued"):
        submit(scheduler, lambda: 1, run="greedy", session="another")
    submit(scheduler, lambda: 1, run="modest")


def test_expired_work_is_not_run(scheduler, gate, clock):
    ran = []
    late = submit(scheduler, lambda: ran.append("late"), deadline=clock.now)
    timely = submit(scheduler, lambda: ran.append("timely"), deadline=clock.now + 1)
    gate.opened.set()
    assert late.exception(WAIT).code == "expired"
    assert timely.result(WAIT) is None
    assert ran == ["timely"]


def test_expired_work_takes_up_no_room(scheduler, gate, clock):
    late = submit(scheduler, lambda: 1, deadline=clock.now + 1)
    submit(scheduler, lambda: 1, deadline=clock.now + 3)
    clock.now += 2
    scheduler.drop_expired()
    assert late.exception(WAIT).code == "expired"
    assert scheduler.num_queued == 1


def test_urgent_work_goes_first_and_is_bounded(scheduler, gate):
    order = []
    request = submit(scheduler, lambda: order.append("request"))
    openings = [scheduler.submit_first(lambda name=name: order.append(name)) for name in "wxyz"]
    with pytest.raises(TargetBusy, match="at most 4 new sessions must wait"):
        scheduler.submit_first(lambda: None)
    gate.opened.set()
    for future in (request, *openings):
        future.result(WAIT)
    assert order == ["w", "x", "y", "z", "request"]


def test_what_is_sent_again_while_it_waits_takes_its_place(scheduler, gate):
    order, recorded = [], []
    first = submit(scheduler, lambda: order.append("first"), request_id="same", record=recorded.append)
    others = [submit(scheduler, lambda: order.append("other")) for _ in range(3)]
    again = submit(scheduler, lambda: order.append("again"), request_id="same")
    assert first.exception(WAIT).code == "expired"
    assert recorded == [first.exception(WAIT)]
    gate.opened.set()
    for future in (again, *others):
        assert future.result(WAIT) is None
    assert order == ["again", "other", "other", "other"]


def test_the_same_id_in_another_session_is_another_request(scheduler, gate):
    futures = [submit(scheduler, lambda: 1, session=session, request_id="same") for session in "ab"]
    gate.opened.set()
    assert [future.result(WAIT) for future in futures] == [1, 1]


def test_cancelled_work_is_not_run(scheduler, gate):
    ran = []
    gone, stays = (
        submit(scheduler, lambda name=name: ran.append(name), request_id=name) for name in ("gone", "stays")
    )
    foreign = submit(scheduler, lambda: ran.append("foreign"), session="b", request_id="gone")
    assert scheduler.cancel("a", ["gone", "never seen"]) == 1
    assert gone.exception(WAIT).code == "expired"
    gate.opened.set()
    assert (stays.result(WAIT), foreign.result(WAIT)) == (None, None)
    assert sorted(ran) == ["foreign", "stays"]


def test_a_refused_sender_is_told_to_wait_for_the_queue_at_its_pace(scheduler, clock):
    assert scheduler.retry_after == 0.01

    def takes_a_second():
        clock.now += 1.0

    submit(scheduler, takes_a_second).result(WAIT)
    gate = Gate()
    submit(scheduler, gate, session="gate")
    assert gate.started.wait(WAIT)
    submit(scheduler, lambda: 1)
    one_waits = scheduler.retry_after
    submit(scheduler, lambda: 1)
    assert 0.01 < one_waits < scheduler.retry_after < 1.0
    gate.opened.set()
    for _ in range(30):
        submit(scheduler, takes_a_second).result(WAIT)
    again = Gate()
    submit(scheduler, again, session="gate")
    assert again.started.wait(WAIT)
    for _ in range(2):
        submit(scheduler, lambda: 1)
    assert scheduler.retry_after == 1.0
    again.opened.set()


def test_drain_waits_for_the_work_under_way(scheduler, gate):
    assert not scheduler.drain(0.0)
    gate.opened.set()
    assert scheduler.drain(WAIT)


def test_drain_finishes_the_queue_and_refuses_new_work(scheduler, gate):
    waiting, opening = submit(scheduler, lambda: 1), scheduler.submit_first(lambda: 2)
    assert not scheduler.drain(0.0)
    with pytest.raises(TargetDraining):
        submit(scheduler, lambda: 3)
    with pytest.raises(TargetDraining):
        scheduler.submit_first(lambda: 3)
    gate.opened.set()
    assert scheduler.drain(WAIT)
    assert waiting.done() and opening.done()
    assert (waiting.result(WAIT), opening.result(WAIT)) == (1, 2)


def test_stop_answers_what_waits(gate, scheduler):
    waiting, opening = submit(scheduler, lambda: 1), scheduler.submit_first(lambda: 2)
    assert not scheduler.stop(0.0)
    assert waiting.exception(WAIT).code == opening.exception(WAIT).code == "draining"
    gate.opened.set()
    assert scheduler.stop(WAIT)
    with pytest.raises(TargetDraining):
        submit(scheduler, lambda: 2)


def test_a_dropped_session_leaves_the_others(scheduler, gate):
    gone, stays = submit(scheduler, lambda: 1, session="a"), submit(scheduler, lambda: 2, session="b")
    scheduler.drop_session("a", "was disconnected")
    scheduler.drop_session("nobody", "was disconnected")
    with pytest.raises(UnknownSession, match="session a was disconnected before this request ran"):
        gone.result(WAIT)
    gate.opened.set()
    assert stays.result(WAIT) == 2


def test_nothing_holds_on_to_a_reply_that_was_handed_out(scheduler):
    class Value:
        pass

    value = weakref.ref(submit(scheduler, Value).result(WAIT))
    assert scheduler.drain(WAIT)
    gc.collect()
    assert value() is None


def raises(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "out_of_memory",
        ),
        (InvalidRequest("why"), "invalid_request"),
        (KeyError("layer"), "failed"),
        (StopIteration(), "failed"),
    ],
)
def test_any_exception_of_a_request_becomes_an_error_of_this_package_and_the_thread_lives(
    scheduler, error, code
):
    recorded = []
    assert submit(scheduler, raises(error), record=recorded.append).exception(WAIT).code == code
    assert submit(scheduler, lambda: 1).result(WAIT) == 1
    assert [error.code for error in recorded] == [code]


def test_an_unforeseen_failure_names_itself_and_is_logged_with_its_traceback(scheduler, caplog):
    with pytest.raises(TargetFailed, match="KeyError: 'layer'"):
        submit(scheduler, raises(KeyError("layer"))).result(WAIT)
    assert caplog.records[-1].exc_info


def test_the_cpu_allocator_is_understood_for_real():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
