"""Every request answered by some target: one thread hands requests out, takes answers in and keeps the sessions alive.

The thread owns all state and only reacts: to requests, to answers, to time. Callers wait on their ticket.
"""

import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable

from eagle_rpc.client.fleet import Fleet
from eagle_rpc.client.heartbeats import Heartbeats
from eagle_rpc.client.replica import Attempt, Replica
from eagle_rpc.client.routing import Router
from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.client.ticket import Ticket
from eagle_rpc.errors import (
    ConnectionLost,
    EagleRpcError,
    RequestExpired,
    StaleIncarnation,
    TargetBusy,
    TargetDraining,
    TargetFailed,
    TargetOutOfMemory,
    TargetUnavailable,
    UnknownSession,
    WaitTimeout,
)
from eagle_rpc.supervision import EncodedSupervision, TokenBatch

logger = logging.getLogger(__name__)

# Seconds between two looks at the clock when nothing happens, and between two lines about an absent target.
_TICK = 0.1
_REPORT_SECONDS = 5.0
# A request is given up after this many request time-outs; time without any target does not count.
_PATIENCE = 3
# A target that raises may be ill alone; another one that raises as well says that the request is at fault.
_MAX_FAILURES = 2
# Seconds between two looks of a waiting caller at whether there is still something to wait for.
_LOOK_SECONDS = 0.5
# Seconds that an answer may still take once this trainer has been told to stop.
_STOP_PATIENCE = 10.0


class Dispatcher:
    """Hands requests to the replicas of `fleet`; moves them elsewhere when a replica is lost, silent, draining or slow."""

    def __init__(self, fleet: Fleet, settings: ClientSettings, stop: threading.Event) -> None:
        self.num_failovers = 0
        self._fleet = fleet
        self._settings = settings
        self._stop = stop
        self._router = Router(offset=settings.index)
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: set[Ticket] = set()
        self._under_way: set[Ticket] = set()
        self._heartbeats = Heartbeats(fleet, settings, wake=self.wake, when_lost=self._lose)
        self._unavailable_since: float | None = None
        self._last_report = 0.0
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)
        fleet.when_changed(self.wake)
        self._thread.start()

    # --- called by others

    def submit(self, tokens: TokenBatch) -> Ticket:
        """Takes a request and returns at once."""
        number = next(self._numbers)
        patience = _PATIENCE * self._settings.request_timeout
        ticket = Ticket(number, f"{self._settings.trainer}-{number}", tokens, patience)
        self._inbox.put(functools.partial(self._take_in, ticket))
        return ticket

    def wait(self, ticket: Ticket) -> EncodedSupervision:
        """The answer. Raises what the target refused it for, or `TargetUnavailable` after the reconnect deadline."""
        patience = _STOP_PATIENCE
        while not ticket.wait(_LOOK_SECONDS):
            if not self._thread.is_alive():
                raise TargetFailed("the dispatch thread has ended; its log says why")
            if self._stop.is_set():
                patience -= _LOOK_SECONDS
                if patience <= 0 or self._unavailable_since is not None:
                    raise TargetUnavailable(
                        f"told to stop while request {ticket.id} was waiting for a target"
                    )
        return ticket.result()

    def abandon(self, tickets: list[Ticket]) -> None:
        """Nobody waits for these any more."""
        self._inbox.put(functools.partial(self._abandon, tickets))

    def wake(self) -> None:
        """Something has changed."""
        self._inbox.put(_nothing)

    def close(self) -> None:
        """Ends the thread, which waits for nobody."""
        self._inbox.put(None)
        self._thread.join()

    # --- the thread

    def _take_in(self, ticket: Ticket) -> None:
        self._waiting.add(ticket)

    def _run(self) -> None:
        try:
            while True:
                try:
                    action = self._inbox.get(timeout=_TICK)
                except queue.Empty:
                    action = _nothing
                if action is None:
                    return
                action()
                self._look_around(time.monotonic())
        except Exception as error:
            logger.exception("the dispatch thread failed")
            for ticket in [*self._waiting, *self._under_way]:
                ticket.fail(TargetFailed(f"the dispatch thread failed: {type(error).__name__}: {error}"))
            raise

    def _look_around(self, now: float) -> None:
        self._heartbeats.tick(now)
        self._give_up_overdue()
        usable = [replica for replica in self._fleet.replicas() if replica.usable]
        if usable:
            self._note_availability(now)
            self._hand_out(usable, now)
        elif self._waiting:
            self._bear_absence(now)

    def _hand_out(self, usable: list[Replica], now: float) -> None:
        for ticket in sorted(self._waiting):
            # A silent replica may have answered after all, or be about to.
            if ticket.settled or not all(one.silent for one in ticket.attempts):
                self._waiting.discard(ticket)
                continue
            untried = [replica for replica in usable if replica not in ticket.let_down_by]
            replica = self._router.choose(untried or usable, now)
            if replica is None:
                continue
            self._waiting.discard(ticket)
            attempt = replica.send(ticket.id, ticket.tokens)
            ticket.attempts[replica] = attempt
            self._under_way.add(ticket)
            attempt.call.when_done(
                functools.partial(self._inbox.put, functools.partial(self._settle, ticket, replica, attempt))
            )

    def _settle(self, ticket: Ticket, replica: Replica, attempt: Attempt) -> None:
        """An attempt has ended."""
        if ticket.attempts.get(replica) is not attempt:
            return
        del ticket.attempts[replica]
        try:
            reply = attempt.call.result()
        except EagleRpcError as error:
            replica.settle(ticket.id, answered=False)
            self._bear(ticket, replica, attempt.session, error)
        else:
            replica.settle(ticket.id, answered=True)
            ticket.deliver(reply)
            self._cancel_elsewhere(ticket)
        if ticket.settled and not ticket.attempts:
            self._under_way.discard(ticket)

    def _bear(self, ticket: Ticket, replica: Replica, session: str, error: EagleRpcError) -> None:
        """What an attempt's failure means for its replica and for the request."""
        match error:
            case TargetBusy():
                replica.not_before = time.monotonic() + error.retry_after
            case TargetDraining():
                replica.draining = True
                self._fleet.last_loss = str(error)
            case UnknownSession():
                self._fleet.renew(replica, session)
            case ConnectionLost() | StaleIncarnation():
                self._lose(replica, error)
            case WaitTimeout():
                ticket.let_down_by.add(replica)
                self._bear_timeout(replica, error)
            case RequestExpired():
                if not ticket.settled:
                    logger.warning("%s", error)
            case TargetFailed() | TargetOutOfMemory():
                ticket.let_down_by.add(replica)
                ticket.failures += 1
                if ticket.failures >= _MAX_FAILURES:
                    ticket.fail(error)
            case _:
                ticket.fail(error)
        self._ask_again(ticket, error)

    def _bear_timeout(self, replica: Replica, error: EagleRpcError) -> None:
        """The replica loses its share; a sole one from which nothing arrives any more is connected anew, as it may be the way."""
        logger.warning("%s", error)
        replica.seconds_per_request = max(replica.seconds_per_request or 0.0, self._settings.request_timeout)
        others = any(one.usable for one in self._fleet.replicas() if one is not replica)
        if (
            self._fleet.may_return
            and not others
            and replica.seconds_without_answer >= self._settings.request_timeout
        ):
            self._lose(replica, error)

    def _ask_again(self, ticket: Ticket, error: EagleRpcError) -> None:
        if ticket.settled or ticket.attempts:
            return
        self._under_way.discard(ticket)
        if ticket in self._waiting:
            return
        if time.monotonic() >= ticket.deadline:
            seconds = _PATIENCE * self._settings.request_timeout
            ticket.fail(
                RequestExpired(
                    f"request {ticket.id} was given up after {seconds:.1f} s, at last because: {error}"
                )
            )
        else:
            if not isinstance(error, TargetBusy):
                self.num_failovers += 1
            self._waiting.add(ticket)

    def _lose(self, replica: Replica, error: EagleRpcError) -> None:
        """The replica is gone; what it owed is asked elsewhere."""
        self._fleet.drop(replica, error)
        for ticket in list(self._under_way):
            if ticket.attempts.pop(replica, None) is not None:
                self._ask_again(ticket, error)

    def _give_up_overdue(self) -> None:
        """Calls that torch never completes; and requests whose replica has fallen silent are asked elsewhere as well."""
        for ticket in list(self._under_way):
            for replica, attempt in list(ticket.attempts.items()):
                if attempt.call.done:
                    self._settle(ticket, replica, attempt)
            if (
                ticket.attempts
                and all(replica.silent for replica in ticket.attempts)
                and ticket not in self._waiting
            ):
                self.num_failovers += 1
                self._waiting.add(ticket)

    def _abandon(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            ticket.fail(RequestExpired(f"request {ticket.id} was abandoned"))
            self._cancel_elsewhere(ticket)
        self._waiting = {ticket for ticket in self._waiting if not ticket.settled}

    def _cancel_elsewhere(self, ticket: Ticket) -> None:
        for replica in list(ticket.attempts):
            replica.cancel([ticket.id])

    # --- no target at all

    def _note_availability(self, now: float) -> None:
        if self._unavailable_since is not None:
            absence = now - self._unavailable_since
            self._unavailable_since = None
            for ticket in [*self._waiting, *self._under_way]:
                ticket.deadline += absence
            logger.info("a target is back after %.1f s", absence)

    def _bear_absence(self, now: float) -> None:
        """Says that it waits, and for whom; gives up at the reconnect deadline, at once where nobody can come back."""
        if self._unavailable_since is None:
            self._unavailable_since = self._last_report = now
        absence = now - self._unavailable_since
        limit = self._settings.reconnect_deadline
        if absence >= limit or not self._fleet.hopeful:
            bound = (
                f"rpc.reconnect_deadline {limit:.0f} s"
                if self._fleet.hopeful
                else "a static job gets no other"
            )
            error = TargetUnavailable(
                f"no target could be reached for {absence:.1f} s ({bound}): {self._fleet.last_loss}"
            )
            for ticket in [*self._waiting, *self._under_way]:
                ticket.fail(error)
            self._waiting.clear()
        elif now - self._last_report >= _REPORT_SECONDS:
            self._last_report = now
            logger.info("waiting for a target to come back, %.0f of %.0f s", absence, limit)


def _nothing() -> None:
    """An action that only makes the thread look around."""
