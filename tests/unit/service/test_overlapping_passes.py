"""The scheduler over passes that a GPU works on: one is begun while the one before it is not finished."""

import gc
import math
import threading
import weakref

import pytest
import torch
from answer_calls import ScriptedAnswering
from scheduler_calls import scheduler_of, submit, submit_prompt
from server_calls import WAIT

from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision import AnswerPrompt, AnswerSettings


class Request:
    """Done when told; `room` is what its results take of the GPU's memory, `fault` is raised when it is finished."""

    def __init__(self, name, *, room=1, fault=None, fault_when_asked=None):
        self.name, self.room, self.fault, self.fault_when_asked = name, room, fault, fault_when_asked
        self.done = threading.Event()


class Results:
    """Memory that a pass takes until nobody holds it."""


class UnderWay:
    def __init__(self, gpu, request, results):
        self._gpu, self._request, self._results = gpu, request, results

    @property
    def is_done(self):
        if self._request.fault_when_asked is not None:
            raise self._request.fault_when_asked
        return self._request.done.is_set()

    def wait(self):
        assert self._request.done.wait(WAIT)

    def finish(self):
        results, self._results = self._results, None
        assert results is not None, "finished twice"
        self._gpu.log.append(f"finish {self._request.name}")
        if self._request.fault is not None:
            fault, self._request.fault = self._request.fault, None
            raise fault
        return self._request.name


class Gpu:
    """Passes that are begun at once, where there is room for their results, and log what happens to them."""

    most_before = 1

    def __init__(self):
        self.log = []
        self.begun = threading.Semaphore(0)
        self.room = math.inf
        self._held = weakref.WeakKeyDictionary()

    def start(self, request):
        gc.collect()
        if sum(self._held.values()) + request.room > self.room:
            raise torch.OutOfMemoryError("no room")
        results = Results()
        self._held[results] = request.room
        self.log.append(f"start {request.name}")
        self.begun.release()
        return UnderWay(self, request, results)


@pytest.fixture
def gpu():
    return Gpu()


@pytest.fixture
def scheduler(gpu, clock):
    made = scheduler_of(gpu, clock, max_queued_requests=4, max_queued_per_session=4)
    yield made
    assert made.stop(WAIT)


def begin(gpu, scheduler, *requests):
    """The futures of requests that have all been begun."""
    futures = [submit(scheduler, request) for request in requests]
    for _ in requests:
        assert gpu.begun.acquire(timeout=WAIT)
    return futures


def test_the_next_pass_begins_before_the_one_before_it_is_finished(gpu, scheduler):
    first, second = Request("first"), Request("second")
    futures = begin(gpu, scheduler, first, second)
    assert scheduler.num_running == 2 and not futures[0].done()
    first.done.set()
    assert futures[0].result(WAIT) == "first"
    assert not futures[1].done()
    second.done.set()
    assert futures[1].result(WAIT) == "second"
    assert gpu.log == ["start first", "start second", "finish first", "finish second"]
    assert scheduler.drain(WAIT) and scheduler.num_passes == 2


def test_a_request_that_comes_while_a_gpu_works_is_begun_at_once(gpu, scheduler):
    first, second = Request("first"), Request("second")
    begin(gpu, scheduler, first)
    begin(gpu, scheduler, second)
    for one in (first, second):
        one.done.set()
    assert scheduler.drain(WAIT)


def test_no_more_than_two_passes_are_under_way(gpu, scheduler):
    requests = [Request(name) for name in "abc"]
    futures = [submit(scheduler, request) for request in requests]
    for request, future in zip(requests, futures, strict=True):
        request.done.set()
        assert future.result(WAIT) == request.name
    assert gpu.log.index("start c") > gpu.log.index("start b") and gpu.log.index("finish a") < gpu.log.index(
        "finish b"
    )
    assert gpu.log.index("finish a") < gpu.log.index("start c")


def test_what_is_urgent_does_not_wait_for_a_gpu(gpu, scheduler):
    under_way = Request("under way")
    begin(gpu, scheduler, under_way)
    answer = scheduler.submit_first(lambda: under_way.done.set() or "urgent")
    assert answer.result(WAIT) == "urgent"
    assert scheduler.drain(WAIT)


def test_what_fails_on_a_gpu_fails_alone(gpu, scheduler):
    bad, good = Request("bad", fault=InvalidRequest("no")), Request("good")
    bad.done.set(), good.done.set()
    futures = [submit(scheduler, one) for one in (bad, good)]
    assert futures[0].exception(WAIT).code == "invalid_request"
    assert futures[1].result(WAIT) == "good"


def test_a_gpu_that_fails_when_asked_is_heard_when_it_answers(gpu, scheduler):
    fault = RuntimeError("device-side assert triggered")
    broken = Request("broken", fault=fault, fault_when_asked=fault)
    broken.done.set()
    assert submit(scheduler, broken).exception(WAIT).code == "failed"
    whole = Request("whole")
    whole.done.set()
    assert submit(scheduler, whole).result(WAIT) == "whole"


def test_a_pass_without_room_beside_another_runs_when_that_one_has_left(gpu, scheduler):
    gpu.room = 3
    first, second = Request("first", room=2), Request("second", room=2)
    futures = begin(gpu, scheduler, first)
    futures.append(submit(scheduler, second))
    for one in (first, second):
        one.done.set()
    assert [future.result(WAIT) for future in futures] == ["first", "second"]


def test_a_pass_that_never_has_room_is_refused(gpu, scheduler):
    gpu.room = 1
    large = Request("large", room=2)
    assert submit(scheduler, large).exception(WAIT).code == "out_of_memory"


def test_a_reply_without_room_beside_the_next_pass_is_made_when_that_one_has_left(gpu, scheduler):
    first, second = Request("first", fault=torch.OutOfMemoryError("no room for the reply")), Request("second")
    futures = begin(gpu, scheduler, first, second)
    for one in (first, second):
        one.done.set()
    assert [future.result(WAIT) for future in futures] == ["first", "second"]
    assert gpu.log == [
        *("start first", "start second", "finish first", "finish second"),
        *("start first", "finish first"),
    ]


def test_stopping_answers_what_a_gpu_works_on(gpu, scheduler):
    under_way = Request("under way")
    (future,) = begin(gpu, scheduler, under_way)
    assert not scheduler.stop(0.0)
    assert not future.done()
    under_way.done.set()
    assert scheduler.stop(WAIT)
    assert future.result(WAIT) == "under way"


def test_a_reply_is_let_go_of_once_it_is_answered(gpu, scheduler):
    kept = []

    class Value:
        pass

    class Made(UnderWay):
        def finish(self):
            super().finish()
            value = Value()
            kept.append(weakref.ref(value))
            return value

    gpu.start, start = lambda request: Made(gpu, request, start(request)._results), gpu.start
    one, other = Request("one"), Request("other")
    for request in (one, other):
        request.done.set()
        future = submit(scheduler, request)
        future.result(WAIT)
        del future
    assert scheduler.drain(WAIT)
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def test_a_forward_thread_that_fails_answers_everybody_and_takes_no_more(gpu, scheduler, caplog):
    under_way, waiting = Request("under way"), Request("waiting")

    def record(outcome):
        raise ZeroDivisionError("in the record")

    futures = [submit(scheduler, under_way, record=record)]
    assert gpu.begun.acquire(timeout=WAIT)
    futures.append(submit(scheduler, waiting))
    for one in (under_way, waiting):
        one.done.set()
    assert {future.exception(WAIT).code for future in futures} == {"failed"}
    assert scheduler.draining and "the forward thread failed" in caplog.text


def test_answers_are_decoded_while_passes_come_and_go(gpu, clock):
    answering = ScriptedAnswering(repeats=2)
    scheduler = scheduler_of(gpu, clock, answering, max_answers=4, max_answer_tokens=400)
    settings = AnswerSettings(max_new_tokens=2, max_length=4, stop_token_ids=())
    prompt = AnswerPrompt(key="a", token_ids=torch.tensor([7]), settings=settings)
    requests = [Request(name) for name in "abc"]
    passes = [submit(scheduler, request) for request in requests]
    answers = [submit_prompt(scheduler, prompt) for _ in range(3)]
    for request in requests:
        request.done.set()
    assert [future.result(WAIT) for future in passes] == ["a", "b", "c"]
    assert [future.result(WAIT).token_ids.tolist() for future in answers] == [[7, 7]] * 3
    assert scheduler.drain(WAIT)
    assert scheduler.stop(WAIT)


@pytest.fixture
def two_gpus(gpu):
    gpu.most_before = 2
    return gpu


def test_over_several_gpus_each_works_on_a_pass_while_one_more_waits(two_gpus, scheduler):
    requests = [Request(name) for name in "abcd"]
    futures = begin(two_gpus, scheduler, *requests[:3])
    assert scheduler.num_running == 3 and two_gpus.log == ["start a", "start b", "start c"]
    futures.append(submit(scheduler, requests[3]))
    for request in requests:
        request.done.set()
    assert [future.result(WAIT) for future in futures] == list("abcd")
    assert [line for line in two_gpus.log if line.startswith("finish")] == [
        f"finish {name}" for name in "abcd"
    ]
    assert two_gpus.log.index("finish a") < two_gpus.log.index("start d") < two_gpus.log.index("finish b")
    assert scheduler.drain(WAIT) and scheduler.num_passes == 4


def test_replies_over_several_gpus_come_in_the_order_of_their_passes(two_gpus, scheduler):
    requests = [Request(name) for name in "abc"]
    futures = begin(two_gpus, scheduler, *requests)
    requests[2].done.set()
    requests[1].done.set()
    assert not any(future.done() for future in futures)
    requests[0].done.set()
    assert [future.result(WAIT) for future in futures] == list("abc")
    assert [line for line in two_gpus.log if line.startswith("finish")] == [
        "finish a",
        "finish b",
        "finish c",
    ]


def test_a_pass_without_room_beside_two_others_runs_when_both_have_left(two_gpus, scheduler):
    two_gpus.room = 4
    requests = [Request("a", room=2), Request("b", room=2), Request("c", room=4)]
    futures = begin(two_gpus, scheduler, *requests[:2])
    futures.append(submit(scheduler, requests[2]))
    for request in requests:
        request.done.set()
    assert [future.result(WAIT) for future in futures] == list("abc")


def test_a_reply_without_room_beside_two_passes_is_made_when_both_have_left(two_gpus, scheduler):
    full = torch.OutOfMemoryError("no room for the reply")
    requests = [Request("a", fault=full), Request("b"), Request("c")]
    futures = begin(two_gpus, scheduler, *requests)
    for request in requests:
        request.done.set()
    assert [future.result(WAIT) for future in futures] == list("abc")
    assert two_gpus.log[-5:] == ["finish a", "finish b", "finish c", "start a", "finish a"]


def test_stopping_answers_all_passes_under_way(two_gpus, scheduler):
    requests = [Request(name) for name in "abc"]
    futures = begin(two_gpus, scheduler, *requests)
    assert not scheduler.stop(0.0)
    for request in requests:
        request.done.set()
    assert scheduler.stop(WAIT)
    assert [future.result(WAIT) for future in futures] == list("abc")
