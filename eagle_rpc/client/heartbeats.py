"""A trainer's heartbeats: they renew the leases of its sessions and show who is silent, draining or gone."""

import logging
from collections.abc import Callable

from eagle_rpc.client.fleet import Fleet
from eagle_rpc.client.replica import Replica, SessionCall
from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.errors import ConnectionLost, EagleRpcError, StaleIncarnation, UnknownSession, WaitTimeout
from eagle_rpc.supervision import HeartbeatReply

logger = logging.getLogger(__name__)


class Heartbeats:
    """One heartbeat under way per replica. It has no thread and never waits: the dispatcher calls `tick`."""

    def __init__(
        self,
        fleet: Fleet,
        settings: ClientSettings,
        *,
        wake: Callable[[], None],
        when_lost: Callable[[Replica, EagleRpcError], None],
    ) -> None:
        """`wake` is called from any thread when a silent replica has answered, `when_lost` from `tick`."""
        self._fleet = fleet
        self._settings = settings
        self._wake = wake
        self._when_lost = when_lost

    def tick(self, now: float) -> None:
        """Handles answers, sends heartbeats that are due, and notices silence; `now` is of time.monotonic."""
        for replica in self._fleet.replicas():
            silence = now - replica.last_sign
            if replica.heartbeat is not None:
                if replica.heartbeat.call.done:
                    self._handle(replica, replica.heartbeat, now)
                elif silence > self._settings.silence:
                    self._mark_silent(replica, silence)
            elif replica.session is not None and (
                silence >= self._settings.heartbeat_interval or replica.silent
            ):
                heartbeat = replica.send_heartbeat()
                # Other answers wait for the next tick: at many targets each of them would cost a look at all.
                if replica.silent:
                    heartbeat.call.when_done(self._wake)

    def _handle(self, replica: Replica, heartbeat: SessionCall, now: float) -> None:
        replica.heartbeat = None
        try:
            reply: HeartbeatReply = heartbeat.call.result()
            if reply.incarnation != replica.info.incarnation:
                raise StaleIncarnation(f"{replica.name} is incarnation {reply.incarnation[:8]} now")
        except (ConnectionLost, StaleIncarnation) as error:
            self._when_lost(replica, error)
        except UnknownSession:
            self._fleet.reopen(replica, heartbeat.session)
        except WaitTimeout:
            self._mark_silent(replica, now - replica.last_sign)
        except EagleRpcError as error:
            logger.warning("the heartbeat at %s failed: %s", replica.name, error)
        else:
            replica.last_sign = now
            replica.draining = reply.draining
            if replica.silent:
                replica.silent = False
                logger.info("%s answers again", replica.name)

    def _mark_silent(self, replica: Replica, seconds: float) -> None:
        if not replica.silent:
            replica.silent = True
            logger.warning("%s has been silent for %.1f s; its requests go elsewhere", replica.name, seconds)
