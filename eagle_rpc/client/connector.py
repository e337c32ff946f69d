"""How a trainer connects to one target, opens its session there, and leaves it."""

import logging
import threading
from dataclasses import replace

from eagle_rpc.client.replica import Replica
from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.errors import ConnectionLost, EagleRpcError, StaleIncarnation, TargetMismatch
from eagle_rpc.rpc import Membership, TargetAddress
from eagle_rpc.supervision import ModelInfo, SessionSpec, TargetExpectation

logger = logging.getLogger(__name__)

BROKEN = (ConnectionLost, StaleIncarnation)
"""Errors after which a connection is of no more use."""


class Connector:
    """Connects to targets of one model only. Safe for threads."""

    def __init__(
        self,
        membership: Membership,
        expected: TargetExpectation,
        settings: ClientSettings,
        stop: threading.Event,
    ) -> None:
        self.info: ModelInfo | None = None
        """Of the first target; all others must equal it."""
        self._membership = membership
        self._expected = expected
        self._settings = settings
        self._stop = stop
        self._lock = threading.Lock()

    def connect(self, address: TargetAddress) -> Replica:
        """Raises `TargetMismatch` unless it holds the model that the draft expects and the others hold."""
        link = self._membership.connect(address)
        try:
            replica = Replica(address.name, link, self._settings, self._stop)
            self._expected.check(replica.info)
            with self._lock:
                self.info = self.info or replica.info
            if replace(replica.info, incarnation=self.info.incarnation) != self.info:
                wanted = f"the same model as the other targets ({self.info})"
                raise TargetMismatch(f"{replica.name} must serve {wanted}, it has {replica.info}")
        except EagleRpcError as error:
            self._membership.leave(link, lost=isinstance(error, BROKEN))
            raise
        logger.info("connected to %s, incarnation %s", address.name, address.incarnation[:8])
        return replica

    def open_session(self, replica: Replica, spec: SessionSpec) -> None:
        """Opens a session, and warns of a lease that heartbeats do not renew in time."""
        session, silence = replica.open_session(spec), self._settings.silence
        logger.info("session open at %s, %d requests at a time", replica.name, session.credits)
        if session.lease <= silence:
            logger.warning(
                "%s ends a session after %g s without a heartbeat, which must be more than "
                "rpc.heartbeat_interval x rpc.heartbeat_misses = %g s",
                *(replica.name, session.lease, silence),
            )

    def leave(self, replica: Replica) -> None:
        """Ends the session and the connection. Raises nothing."""
        try:
            # At a silent target the lease ends the session.
            if not replica.silent:
                replica.disconnect()
        except EagleRpcError as error:
            logger.warning("the session at %s was not ended: %s", replica.name, error)
        self._membership.leave(replica.link, lost=False)
