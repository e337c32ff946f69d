"""The targets that a trainer is connected to, kept up to date while targets come and go."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from eagle_rpc import errors
from eagle_rpc.client.connector import BROKEN, Connector
from eagle_rpc.client.nearest import nearest
from eagle_rpc.client.replica import Replica
from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.errors import EagleRpcError, StaleIncarnation, TargetMismatch, TargetUnavailable
from eagle_rpc.process.waiting import BoundedWait
from eagle_rpc.rpc import Membership, TargetAddress
from eagle_rpc.supervision import ModelInfo, SessionSpec, TargetExpectation

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# Seconds between two looks while no target can be used.
_SHORT_PAUSE = 0.2
# Seconds until a target that failed is tried again: at first, and at most; each failure doubles them.
_FIRST_RETRY, _LONGEST_RETRY = 0.1, 2.0
# Seconds after which no request can still be on its way to a replica that was retired.
_RETIRED_SECONDS = 0.5
# No other target would answer these differently, now or later.
_FINAL = (errors.InvalidRequest, errors.PayloadRefused, TargetMismatch, errors.UnsupportedTarget)
_TEMPORARY = (*BROKEN, errors.TargetBusy, errors.TargetDraining, errors.UnknownSession, errors.WaitTimeout)


@dataclass(slots=True)
class _Target:
    """One incarnation of a target: new, attaching (its thread runs), connected or refused."""

    replica: Replica | None = None  # once connected
    refused: EagleRpcError | None = None  # never tried again
    attaching: bool = False
    not_before: float = 0.0  # time.monotonic of the next try
    pause: float = _FIRST_RETRY


class Fleet:
    """Connects to every target that serves, or to `most_targets` of them, and opens this trainer's session there.

    One thread, `fleet`, looks up which targets serve and drops those that were replaced. For each target that
    is not connected or has no session it starts a short thread, which may wait for that target and delays no
    other.
    """

    def __init__(
        self,
        membership: Membership,
        expected: TargetExpectation,
        settings: ClientSettings,
        stop: threading.Event,
    ) -> None:
        """`stop`: once set, waiting ends."""
        self.last_loss = "none has served yet"  # why the latest target was lost or refused
        self.when_changed: Callable[[], None] = lambda: None  # called after every change, from any thread
        self._membership = membership
        self._connector = Connector(membership, expected, settings, stop)
        self._settings = settings
        self._stop = stop
        self._spec: SessionSpec | None = None
        self._changed = threading.Condition()
        self._addresses: Sequence[TargetAddress] = ()
        self._targets: dict[str, _Target] = {}  # by incarnation
        self._lookup_failed = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self._thread.start()

    # --- called from other threads

    @property
    def elastic(self) -> bool:
        """Whether a lost target can return, or another one take its place."""
        return self._membership.elastic

    @property
    def can_recover(self) -> bool:
        """Whether waiting may help while no replica can be used."""
        return self.elastic or any(not replica.draining for replica in self.replicas())

    def replicas(self) -> list[Replica]:
        """All connected targets, usable or not."""
        with self._changed:
            return [target.replica for target in self._targets.values() if target.replica is not None]

    def connect(self) -> ModelInfo:
        """Waits until one target is connected; with static membership, all of them.

        Raises `TargetMismatch` for a target that differs from the expectation or from the other targets, and
        `TargetUnavailable` after the reconnect deadline.
        """
        self._wait_for("a target to serve", lambda replica: True)
        assert self._connector.info is not None
        return self._connector.info

    def open_sessions(self, spec: SessionSpec) -> None:
        """Opens a session at every target, now and whenever one joins. Waits as `connect` does.

        Raises a target's refusal of the session, and `TargetUnavailable` after the reconnect deadline.
        """
        with self._changed:
            self._spec = spec
        self._wake.set()
        self._wait_for("a session at a target", lambda replica: replica.session is not None)

    def ask(self, question: Callable[[Replica], Answer], what: str) -> Answer:
        """The first answer to `question`; replicas that cannot answer now are skipped. `what` is for errors.

        Raises a replica's refusal, and `TargetUnavailable` after the reconnect deadline.
        """
        wait = BoundedWait(what, self._settings.reconnect_deadline)
        while True:
            for replica in self.replicas():
                try:
                    return question(replica)
                except _TEMPORARY as error:
                    logger.warning("%s did not give %s: %s", replica.name, what, error)
                    if isinstance(error, BROKEN):
                        self.drop(replica, error)
            if wait.over or self._stop.is_set() or not self.can_recover:
                raise TargetUnavailable(f"no target gave {what} (rpc.reconnect_deadline): {self.last_loss}")
            with self._changed:
                self._changed.wait(min(_SHORT_PAUSE, wait.left))

    def drop(self, replica: Replica, error: EagleRpcError) -> None:
        """Gives up a connection; a target that still serves is connected again."""
        with self._changed:
            known = [target for target in self._targets.values() if target.replica is replica]
            for target in known:
                target.replica = None
            # Ends every wait for an answer of it.
            replica.silent = True
            self.last_loss = str(error)
        if known:
            logger.warning("%s", error)
            self._membership.leave(replica.link, lost=True)
            self._notify()

    def reopen(self, replica: Replica, session: str) -> None:
        """Opens a new session in place of the one with that id, which expired. A second call does nothing."""
        if replica.session is not None and replica.session.id == session:
            replica.session = None
            logger.warning("the session at %s has expired and is opened again", replica.name)
            self._wake.set()

    def close(self) -> None:
        """Ends the sessions and the thread. Raises nothing, so that an earlier error is not hidden."""
        self._closing.set()
        self._wake.set()
        self._thread.join()
        for replica in self.replicas():
            self._connector.leave(replica)

    def _wait_for(self, what: str, counts: Callable[[Replica], bool]) -> None:
        """Waits until `counts` holds for one replica; with static membership, for all targets."""
        wait = BoundedWait(what, self._settings.reconnect_deadline)
        with self._changed:
            while not self._enough(filter(counts, self.replicas())):
                if wait.over or self._stop.is_set():
                    raise TargetUnavailable(f"{wait.timeout(self.last_loss)} (rpc.reconnect_deadline)")
                wait.say(self.last_loss)
                self._changed.wait(_SHORT_PAUSE)

    def _enough(self, ready: Iterable[Replica]) -> bool:
        """Whether the wait is over; raises a refusal if it would never be."""
        num_ready, num_targets = len(list(ready)), len(self._addresses)
        known = [self._targets.get(address.incarnation, _Target()) for address in self._addresses]
        refusals = [target.refused for target in known if target.refused is not None]
        if refusals and (not self.elastic or len(refusals) == num_targets):
            raise refusals[0]
        return num_ready > 0 if self.elastic else num_ready == num_targets > 0

    # --- the thread

    def _run(self) -> None:
        while not self._closing.is_set():
            serving = self._look_up()
            self._attach_targets(serving)
            self._retire_others(serving)
            in_use = any(replica.usable for replica in self.replicas())
            self._wake.wait(self._settings.heartbeat_interval if in_use else _SHORT_PAUSE)
            self._wake.clear()

    def _look_up(self) -> Sequence[TargetAddress]:
        """The targets that serve; the last known ones if the lookup fails."""
        try:
            addresses = self._membership.targets()
        except EagleRpcError as error:
            if not self._lookup_failed:
                logger.warning("targets cannot be looked up for now: %s", error)
            self._lookup_failed = True
            return self._addresses
        if self._lookup_failed:
            logger.info("targets can be looked up again")
        self._lookup_failed = False
        self._drop_replaced({address.name: address.incarnation for address in addresses})
        return addresses

    def _drop_replaced(self, serving: dict[str, str]) -> None:
        """Drops replicas whose name another process has. RPC finds peers by name and would call that one."""
        with self._changed:
            known = [(incarnation, target.replica) for incarnation, target in self._targets.items()]
        for incarnation, replica in known:
            if replica is not None and (now := serving.get(replica.name, incarnation)) != incarnation:
                why = f"{replica.name} is another process now, incarnation {now[:8]}"
                self.drop(replica, StaleIncarnation(why))

    def _attach_targets(self, addresses: Sequence[TargetAddress]) -> None:
        """Starts a thread for each target that has to be connected or needs a session."""
        now = time.monotonic()
        with self._changed:
            usable = [
                one for one in addresses if self._targets.get(one.incarnation, _Target()).refused is None
            ]
            near = nearest(usable, self._settings) if self.elastic else addresses
            # Who refuses is remembered, since a wait for targets ends when all of them do.
            self._addresses = near or addresses
            self._forget_others({address.incarnation for address in addresses})
            for address in near:
                target = self._targets.setdefault(address.incarnation, _Target())
                replica = target.replica
                if replica is not None:
                    replica.retired = None
                complete = replica is not None and (replica.session is not None or self._spec is None)
                if not (complete or target.attaching or target.refused or now < target.not_before):
                    target.attaching = True
                    name = f"attach {address.name}"
                    thread = threading.Thread(target=self._attach, args=(address, target), name=name)
                    thread.daemon = True
                    thread.start()

    def _forget_others(self, serving: Collection[str]) -> None:
        """Forgets incarnations that have ended: each target that returns is a new one. To be called with the lock."""
        for incarnation, target in list(self._targets.items()):
            if incarnation not in serving and target.replica is None and not target.attaching:
                del self._targets[incarnation]

    def _retire_others(self, serving: Sequence[TargetAddress]) -> None:
        """Leaves targets that serve and are not among the nearest any more, once all of those are usable."""
        now = time.monotonic()
        with self._changed:
            near = {address.incarnation for address in self._addresses}
            known = {incarnation: target.replica for incarnation, target in self._targets.items()}
        replicas = [known.get(incarnation) for incarnation in near]
        complete = all(replica is not None and replica.usable for replica in replicas)
        others = {address.incarnation for address in serving} - near
        for incarnation in others & known.keys():
            replica = known[incarnation]
            if replica is None:
                continue
            if replica.retired is None:
                replica.retired = now if complete else None
            elif replica.num_outstanding == 0 and now - replica.retired >= _RETIRED_SECONDS:
                with self._changed:
                    del self._targets[incarnation]
                logger.info("%s is left to other trainers (rpc.targets_per_trainer)", replica.name)
                name = f"leave {replica.name}"
                threading.Thread(
                    target=self._connector.leave, args=(replica,), name=name, daemon=True
                ).start()

    # --- the thread of one target

    def _attach(self, address: TargetAddress, target: _Target) -> None:
        """Connects a target, then opens the session if there is one to open."""
        try:
            replica = target.replica
            if replica is None:
                replica = self._connector.connect(address)
                with self._changed:
                    target.replica = replica
            if self._spec is not None and replica.session is None and not self._closing.is_set():
                self._connector.open_session(replica, self._spec)
        except _FINAL as error:
            logger.warning("%s is not used: %s", address.name, error)
            target.refused, self.last_loss = error, str(error)
        except EagleRpcError as error:
            logger.debug("%s is tried again in %.1f s: %s", address.name, target.pause, error)
            target.not_before = time.monotonic() + target.pause
            target.pause = min(2 * target.pause, _LONGEST_RETRY)
            self.last_loss = str(error)
            if target.replica is not None and isinstance(error, BROKEN):
                self.drop(target.replica, error)
        else:
            target.not_before, target.pause = 0.0, _FIRST_RETRY
        finally:
            target.attaching = False
            self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
        self._wake.set()
        self.when_changed()
