"""The targets that a trainer is connected with, kept up to date while targets come and go.

One thread looks who serves. What may have to wait for a peer, connecting and opening a session, has a thread of its own
for each target, so that one that is stuck keeps nobody else out.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from eagle_rpc.client.replica import SERVICE_NAME, Replica
from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.errors import (
    ConnectionLost,
    EagleRpcError,
    InvalidRequest,
    PayloadRefused,
    StaleIncarnation,
    TargetBusy,
    TargetDraining,
    TargetMismatch,
    TargetUnavailable,
    UnknownSession,
    UnsupportedTarget,
    WaitTimeout,
)
from eagle_rpc.rpc import Membership, TargetAddress
from eagle_rpc.supervision import ModelInfo, SessionSpec, TargetExpectation

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# Seconds between two looks while no target can be used, and between two lines about waiting.
_HURRY = 0.2
_REPORT_SECONDS = 5.0
# Seconds until a target that did not answer is tried again; doubled up to the second after each failure.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
# No other target and no other moment would answer these differently.
_FINAL = (InvalidRequest, PayloadRefused, TargetMismatch, UnsupportedTarget)
_BROKEN = (ConnectionLost, StaleIncarnation)
_PASSING = (ConnectionLost, StaleIncarnation, TargetBusy, TargetDraining, UnknownSession, WaitTimeout)


class Fleet:
    """Connects to every target that serves, and opens this trainer's session there once there is one to open."""

    def __init__(
        self,
        membership: Membership,
        expected: TargetExpectation,
        settings: ClientSettings,
        stop: threading.Event,
    ) -> None:
        self.info: ModelInfo | None = None
        self.last_loss = "none has served yet"
        self._membership = membership
        self._expected = expected
        self._settings = settings
        self._stop = stop
        self._spec: SessionSpec | None = None
        self._changed = threading.Condition()
        self._addresses: Sequence[TargetAddress] = ()
        self._replicas: dict[str, Replica] = {}  # by incarnation, as everything below
        self._refused: dict[str, EagleRpcError] = {}
        self._busy: set[str] = set()
        self._pauses: dict[str, tuple[float, float]] = {}  # not before, and seconds of the pause
        self._registry_lost = False
        self._when_changed: Callable[[], None] = lambda: None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self._thread.start()

    # --- for the rest of the client

    @property
    def may_return(self) -> bool:
        """Whether a target that is lost can come back, or another one in its place."""
        return self._membership.elastic

    @property
    def hopeful(self) -> bool:
        """Whether waiting may help when no replica can be used."""
        return self.may_return or any(not one.draining for one in self.replicas())

    def when_changed(self, callback: Callable[[], None]) -> None:
        """Has `callback` called after every change, from any thread."""
        self._when_changed = callback

    def replicas(self) -> list[Replica]:
        """All that are connected, whether or not they can be used now."""
        with self._changed:
            return list(self._replicas.values())

    def connect(self) -> ModelInfo:
        """Waits until a target is connected; for all of them where membership is static.

        Raises `TargetMismatch` for a foreign target or replicas that differ, `TargetUnavailable` after the reconnect deadline.
        """
        self._wait_until(lambda: self._enough(self._replicas.values()), "a target to serve")
        assert self.info is not None
        return self.info

    def open_sessions(self, spec: SessionSpec) -> None:
        """Opens a session at every replica, now and whenever one joins; returns when one can be used (static: all).

        Raises what the targets refuse the session for, `TargetUnavailable` after the reconnect deadline.
        """
        with self._changed:
            self._spec = spec
        self._wake.set()
        self._wait_until(
            lambda: self._enough([one for one in self._replicas.values() if one.session]),
            "a session at a target",
        )

    def ask(self, question: Callable[[Replica], Answer], what: str) -> Answer:
        """The first answer that any replica gives to `question`; those that cannot answer now are passed over.

        Raises what a replica refuses it for, `TargetUnavailable` after the reconnect deadline.
        """
        deadline = time.monotonic() + self._settings.reconnect_deadline
        while True:
            for replica in self.replicas():
                try:
                    return question(replica)
                except _PASSING as error:
                    logger.warning("%s did not give %s: %s", replica.name, what, error)
                    if isinstance(error, _BROKEN):
                        self.drop(replica, error)
            left = deadline - time.monotonic()
            if left <= 0 or self._stop.is_set() or not self.hopeful:
                raise TargetUnavailable(f"no target gave {what} (rpc.reconnect_deadline): {self.last_loss}")
            with self._changed:
                self._changed.wait(min(_HURRY, left))

    def drop(self, replica: Replica, error: EagleRpcError) -> None:
        """This connection is of no more use; a target that still serves is connected anew."""
        with self._changed:
            known = [incarnation for incarnation, one in self._replicas.items() if one is replica]
            for incarnation in known:
                del self._replicas[incarnation]
            # What it still owes is asked elsewhere.
            replica.silent = True
            self.last_loss = str(error)
        if known:
            logger.warning("%s", error)
            self._membership.leave(replica.link, lost=True)
            self._tell()

    def renew(self, replica: Replica, session: str) -> None:
        """The session of that id has lapsed at the target; another one is opened, unless it has been."""
        if replica.session is None or replica.session.id != session:
            return
        replica.session = None
        logger.warning("the session at %s has lapsed and is opened again", replica.name)
        self._wake.set()

    def close(self) -> None:
        """Ends the sessions; raises nothing, since what went wrong before matters more."""
        self._closing.set()
        self._wake.set()
        self._thread.join()
        for replica in self.replicas():
            try:
                # A silent one would only be waited for; its lease ends the session.
                if not replica.silent:
                    replica.disconnect()
            except EagleRpcError as error:
                logger.warning("the session at %s was not ended: %s", replica.name, error)
            self._membership.leave(replica.link, lost=False)

    # --- waiting for others

    def _enough(self, there: Sequence[Replica]) -> bool:
        """Whether one (static: every one) of the targets is among `there`; raises what they were refused for."""
        refused = [
            self._refused[one.incarnation] for one in self._addresses if one.incarnation in self._refused
        ]
        if refused and (not self.may_return or len(refused) == len(self._addresses)):
            raise refused[0]
        return len(there) > 0 if self.may_return else len(there) == len(self._addresses) > 0

    def _wait_until(self, holds: Callable[[], bool], what: str) -> None:
        started = last_report = time.monotonic()
        limit = self._settings.reconnect_deadline
        with self._changed:
            while not holds():
                now = time.monotonic()
                if now - started >= limit or self._stop.is_set():
                    raise TargetUnavailable(
                        f"waited {now - started:.0f} of {limit:.0f} s (rpc.reconnect_deadline) for {what}: {self.last_loss}"
                    )
                if now - last_report >= _REPORT_SECONDS:
                    last_report = now
                    logger.info(
                        "waiting for %s, %.0f of %.0f s: %s", what, now - started, limit, self.last_loss
                    )
                self._changed.wait(_HURRY)

    # --- the thread

    def _run(self) -> None:
        while not self._closing.is_set():
            self._look()
            in_use = any(one.usable for one in self.replicas())
            self._wake.wait(self._settings.heartbeat_interval if in_use else _HURRY)
            self._wake.clear()

    def _look(self) -> None:
        """Starts what there is to do for each target."""
        try:
            addresses = self._membership.targets()
        except EagleRpcError as error:
            if not self._registry_lost:
                logger.warning("targets are not looked up for now: %s", error)
            self._registry_lost = True
            addresses = self._addresses
        else:
            if self._registry_lost:
                logger.info("targets are looked up again")
            self._registry_lost = False
        self._drop_superseded(addresses)
        now = time.monotonic()
        with self._changed:
            self._addresses = addresses
            for address in addresses:
                replica = self._replicas.get(address.incarnation)
                complete = replica is not None and (replica.session is not None or self._spec is None)
                not_before, _ = self._pauses.get(address.incarnation, (0.0, 0.0))
                if complete or address.incarnation in self._busy | self._refused.keys() or now < not_before:
                    continue
                self._busy.add(address.incarnation)
                threading.Thread(
                    target=self._bring_in, args=(address,), name=f"bring in {address.name}", daemon=True
                ).start()

    def _drop_superseded(self, addresses: Sequence[TargetAddress]) -> None:
        """Another process serves under the name of a replica: RPC finds peers by name, so calls to the old one would reach it."""
        serving = {address.name: address.incarnation for address in addresses}
        with self._changed:
            superseded = [
                replica
                for incarnation, replica in self._replicas.items()
                if serving.get(replica.name, incarnation) != incarnation
            ]
        for replica in superseded:
            self.drop(
                replica,
                StaleIncarnation(
                    f"{replica.name} is another process now, incarnation {serving[replica.name][:8]}"
                ),
            )

    def _bring_in(self, address: TargetAddress) -> None:
        """Connects a target, or opens the session at one that is connected."""
        try:
            replica = self._replicas.get(address.incarnation) or self._connect(address)
            if self._spec is not None and replica.session is None and not self._closing.is_set():
                replica.open_session(self._spec)
                logger.info(
                    "session open at %s, %d requests at a time", replica.name, replica.session.credits
                )
                if replica.session.lease <= self._settings.silence:
                    logger.warning(
                        "%s ends a session after %g s without a heartbeat, which is not more than rpc.heartbeat_interval x "
                        "rpc.heartbeat_misses = %g s",
                        replica.name,
                        replica.session.lease,
                        self._settings.silence,
                    )
        except _FINAL as error:
            self._refuse(address, error)
        except EagleRpcError as error:
            self._pause(address, error)
        else:
            with self._changed:
                self._pauses.pop(address.incarnation, None)
        finally:
            with self._changed:
                self._busy.discard(address.incarnation)
            self._tell()

    def _connect(self, address: TargetAddress) -> Replica:
        """Raises `TargetMismatch` unless it holds the model that the draft expects and that the other replicas have."""
        link = self._membership.connect(address, SERVICE_NAME)
        try:
            replica = Replica(
                address.name, link, request_timeout=self._settings.request_timeout, stop=self._stop
            )
            self._expected.check(replica.info)
            with self._changed:
                self.info = self.info or replica.info
                if replace(replica.info, incarnation=self.info.incarnation) != self.info:
                    raise TargetMismatch(
                        f"{replica.name} must serve the same model as the other targets ({self.info}), it has {replica.info}"
                    )
                self._replicas[address.incarnation] = replica
        except EagleRpcError as error:
            self._membership.leave(link, lost=isinstance(error, _BROKEN))
            raise
        logger.info("connected with %s, incarnation %s", address.name, address.incarnation[:8])
        return replica

    def _refuse(self, address: TargetAddress, error: EagleRpcError) -> None:
        logger.warning("%s is not used: %s", address.name, error)
        with self._changed:
            self._refused[address.incarnation] = error
            self.last_loss = str(error)

    def _pause(self, address: TargetAddress, error: EagleRpcError) -> None:
        with self._changed:
            replica = self._replicas.get(address.incarnation)
            _, pause = self._pauses.get(address.incarnation, (0.0, _FIRST_PAUSE))
            self._pauses[address.incarnation] = (time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE))
            self.last_loss = str(error)
        if replica is not None and isinstance(error, _BROKEN):
            self.drop(replica, error)
        logger.debug("%s is tried again in %.1f s: %s", address.name, pause, error)

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
        self._wake.set()
        self._when_changed()
