"""The requests of a trainer, batches or prompts, each of which is answered by some target."""

import concurrent.futures
import contextlib
import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection

from eagle_rpc import errors
from eagle_rpc.client.absence import Absence
from eagle_rpc.client.fleet import Fleet
from eagle_rpc.client.heartbeats import Heartbeats
from eagle_rpc.client.replica import Replica, Router, SessionCall, Trip
from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.errors import EagleRpcError, RequestExpired, TargetBusy, TargetFailed, TargetUnavailable
from eagle_rpc.supervision import AnswerPrompt, EncodedSupervision, PromptAnswer, TokenBatch

logger = logging.getLogger(__name__)

Content = TokenBatch | AnswerPrompt
Answer = EncodedSupervision | PromptAnswer

# Seconds between two looks at the clock when nothing happens.
_TICK = 0.1
# A request is given up after this many request timeouts; time without any target does not count.
_MOST_TIMEOUTS = 3
# One failure may be the target's fault; a second one, at another target, is the request's.
_MOST_FAILURES = 2
# Seconds between two looks of a waiting caller at whether to go on waiting.
_LOOK_SECONDS = 0.5
# Seconds that a caller still waits for an answer after this trainer was told to stop.
_STOP_SECONDS = 10.0


class PendingRequest:
    """One request until it is answered, by any target. Only the dispatcher's thread changes it.

    States: *waiting* for a replica, *under way* with an attempt at each replica that was asked, *done*. It is
    waiting and under way at the same time if all replicas that were asked are silent.
    """

    def __init__(self, number: int, request_id: str, content: Content, seconds: float) -> None:
        self.number = number
        self.id = request_id
        self.content = content
        self.submitted = time.monotonic()
        self.deadline = self.submitted + seconds
        self.trip: Trip | None = None  # once it is answered
        self.attempts: dict[Replica, SessionCall] = {}
        self.num_failures = 0
        self.failed_at: set[Replica] = set()  # asked again only if there is no other
        self.answer: concurrent.futures.Future[Answer] = concurrent.futures.Future()

    @property
    def done(self) -> bool:
        return self.answer.done()

    def complete(self, reply: Answer, trip: Trip) -> None:
        """The first outcome counts, here and in `fail`."""
        if not self.done:
            self.trip = trip
            self.answer.set_result(reply)

    def fail(self, error: EagleRpcError) -> None:
        if not self.done:
            self.answer.set_exception(error)

    def result(self) -> Answer:
        """The answer of a request that is done, or its error raised."""
        return self.answer.result()


class Dispatcher:
    """Sends requests to the replicas of a fleet, and to others when one is lost, silent, draining or slow.

    One thread, `dispatch`, owns all requests. It takes events from a queue (a request is new or abandoned, an
    attempt has finished) and then looks for work: heartbeats, attempts that ran out of time, requests that
    wait. It waits for that queue only. Callers wait for their request.
    """

    def __init__(self, fleet: Fleet, settings: ClientSettings, stop: threading.Event) -> None:
        """`stop`: once set, callers wait a few more seconds at most."""
        self.num_failovers = 0
        self._fleet = fleet
        self._settings = settings
        self._stop = stop
        self._request_seconds = _MOST_TIMEOUTS * settings.request_timeout
        self._router = Router(offset=settings.index)
        self._numbers = itertools.count()
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: set[PendingRequest] = set()
        self._under_way: set[PendingRequest] = set()
        self._absence = Absence(fleet, settings.reconnect_deadline)
        self._heartbeats = Heartbeats(fleet, settings, wake=self.wake, when_lost=self._lose)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)
        fleet.when_changed = self.wake
        self._thread.start()

    # --- called from other threads

    def submit(self, content: Content) -> PendingRequest:
        """Starts a request and returns at once."""
        number = next(self._numbers)
        request_id = f"{self._settings.session.trainer}-{number}"
        request = PendingRequest(number, request_id, content, self._request_seconds)
        self._events.put(functools.partial(self._waiting.add, request))
        return request

    def wait(self, request: PendingRequest) -> Answer:
        """The answer. Raises the target's refusal, or `TargetUnavailable` after the reconnect deadline."""
        self.wait_any([request])
        return request.result()

    def wait_any(self, requests: Collection[PendingRequest]) -> list[PendingRequest]:
        """Waits until some of `requests` are done, and returns those. Raises only if none will be soon."""
        seconds_left = _STOP_SECONDS
        while not (done := [request for request in requests if request.done]):
            if not self._thread.is_alive():
                raise TargetFailed("the dispatch thread has ended; its log says why")
            if self._stop.is_set():
                if seconds_left <= 0 or self._absence.lasts:
                    raise TargetUnavailable("told to stop while requests waited for a target")
                seconds_left -= _LOOK_SECONDS
            answers = [request.answer for request in requests]
            concurrent.futures.wait(answers, _LOOK_SECONDS, concurrent.futures.FIRST_COMPLETED)
        return done

    def abandon(self, requests: list[PendingRequest]) -> None:
        """Gives up requests whose answers are not needed any more."""
        self._events.put(functools.partial(self._abandon, requests))

    def wake(self) -> None:
        """Makes the thread look for work."""
        self._events.put(lambda: None)

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        self.wake()
        self._thread.join()

    # --- the thread

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                with contextlib.suppress(queue.Empty):
                    self._events.get(timeout=_TICK)()
                    # One look for all events that have come.
                    for _ in range(self._events.qsize()):
                        self._events.get_nowait()()
                self._look_for_work(time.monotonic())
        except Exception as error:
            # Callers would wait for ever for a thread that has ended.
            logger.exception("the dispatch thread failed")
            self._fail_all(TargetFailed(f"the dispatch thread failed: {type(error).__name__}: {error}"))
            raise

    def _look_for_work(self, now: float) -> None:
        self._heartbeats.tick(now)
        self._check_attempts()
        usable = [replica for replica in self._fleet.replicas() if replica.usable]
        if usable:
            if self._absence.lasts:
                self._end_absence()
            self._send_waiting(usable, now)
        elif self._waiting and (failure := self._absence.failure()):
            self._fail_all(failure)

    def _end_absence(self) -> None:
        seconds = self._absence.end()
        for request in [*self._waiting, *self._under_way]:
            request.deadline += seconds
        logger.info("a target is back after %.1f s", seconds)

    def _send_waiting(self, usable: list[Replica], now: float) -> None:
        for request in sorted(self._waiting, key=lambda one: one.number):
            # A silent replica may have answered since, or be about to.
            if request.done or not all(replica.silent for replica in request.attempts):
                self._waiting.discard(request)
                continue
            untried = [replica for replica in usable if replica not in request.failed_at]
            replica = self._router.choose(untried or usable, now)
            if replica is None:
                continue
            self._waiting.discard(request)
            self._under_way.add(request)
            attempt = request.attempts[replica] = replica.send(request.id, request.content)
            finish = functools.partial(self._finish_attempt, request, replica, attempt)
            attempt.call.when_done(functools.partial(self._events.put, finish))

    def _check_attempts(self) -> None:
        """Ends calls that torch never completes. Asks another replica if those that were asked are silent."""
        for request in list(self._under_way):
            for replica, attempt in list(request.attempts.items()):
                if attempt.call.done:
                    self._finish_attempt(request, replica, attempt)
            silent = request.attempts and all(replica.silent for replica in request.attempts)
            if silent and request not in self._waiting:
                self.num_failovers += 1
                self._waiting.add(request)

    def _finish_attempt(self, request: PendingRequest, replica: Replica, attempt: SessionCall) -> None:
        if request.attempts.get(replica) is not attempt:
            return
        del request.attempts[replica]
        try:
            reply = attempt.call.result()
        except EagleRpcError as error:
            replica.finish(request.id, answered=False)
            self._handle_failure(request, replica, attempt.session, error)
        else:
            replica.finish(request.id, answered=True)
            request.complete(reply, Trip(replica.name, attempt.sent, time.monotonic()))
            self._cancel_attempts(request)
        if request.done and not request.attempts:
            self._under_way.discard(request)

    def _handle_failure(
        self, request: PendingRequest, replica: Replica, session: str, error: EagleRpcError
    ) -> None:
        match error:
            case TargetBusy():
                replica.not_before = time.monotonic() + error.retry_after
            case errors.TargetDraining():
                replica.draining = True
                self._fleet.last_loss = str(error)
            case errors.UnknownSession():
                self._fleet.reopen(replica, session)
            case errors.ConnectionLost() | errors.StaleIncarnation():
                self._lose(replica, error)
            case errors.WaitTimeout():
                request.failed_at.add(replica)
                self._handle_timeout(replica, error)
            case RequestExpired():
                if not request.done:
                    logger.warning("%s", error)
            case TargetFailed() | errors.TargetOutOfMemory():
                request.failed_at.add(replica)
                request.num_failures += 1
                if request.num_failures >= _MOST_FAILURES:
                    request.fail(error)
            case _:
                request.fail(error)
        self._ask_again(request, error)

    def _handle_timeout(self, replica: Replica, error: EagleRpcError) -> None:
        """Lowers the replica's pace. A sole one that answers nothing is connected anew, which may help."""
        logger.warning("%s", error)
        timeout = self._settings.request_timeout
        replica.seconds_per_request = max(replica.seconds_per_request or 0.0, timeout)
        sole = not any(one.usable for one in self._fleet.replicas() if one is not replica)
        silent_for = time.monotonic() - replica.last_answer
        if self._fleet.elastic and sole and silent_for >= timeout:
            self._lose(replica, error)

    def _ask_again(self, request: PendingRequest, error: EagleRpcError) -> None:
        """Puts a request without attempts back among those that wait, unless its time is up."""
        if request.done or request.attempts:
            return
        self._under_way.discard(request)
        if request in self._waiting:
            return
        if time.monotonic() >= request.deadline:
            given_up = f"request {request.id} was given up after {self._request_seconds:.1f} s"
            request.fail(RequestExpired(f"{given_up}, at last because: {error}"))
        else:
            self.num_failovers += not isinstance(error, TargetBusy)
            self._waiting.add(request)

    def _lose(self, replica: Replica, error: EagleRpcError) -> None:
        """Drops a replica whose connection is gone, and asks others for its requests."""
        self._fleet.drop(replica, error)
        for request in list(self._under_way):
            if request.attempts.pop(replica, None) is not None:
                self._ask_again(request, error)

    def _abandon(self, requests: list[PendingRequest]) -> None:
        for request in requests:
            request.fail(RequestExpired(f"request {request.id} was abandoned"))
            self._cancel_attempts(request)
            self._waiting.discard(request)

    def _cancel_attempts(self, request: PendingRequest) -> None:
        for replica in request.attempts:
            replica.cancel(request.id)

    def _fail_all(self, error: EagleRpcError) -> None:
        for request in [*self._waiting, *self._under_way]:
            request.fail(error)
        self._waiting.clear()
