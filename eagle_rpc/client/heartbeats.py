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
        """`wake` is called from any thread when an answer has come, `when_lost` from `tick`."""
        self._fleet = fleet
        self._settings = settings
        self._wake = wake
        self._when_lost = when_lost
        self._under_way: dict[Replica, SessionCall] = {}
        self._last_answer: dict[Replica, float] = {}  # time.monotonic; at first, when the replica came

    def tick(self, now: float) -> None:
        """Handles answers, sends heartbeats that are due, and notices silence; `now` is of time.monotonic."""
        replicas = self._fleet.replicas()
        for gone in self._last_answer.keys() - set(replicas):
            del self._last_answer[gone]
            self._under_way.pop(gone, None)
        for replica in replicas:
            if replica.session is not None:
                self._tick(replica, now)

    def _tick(self, replica: Replica, now: float) -> None:
        silence = now - self._last_answer.setdefault(replica, now)
        heartbeat = self._under_way.get(replica)
        if heartbeat is None:
            if silence >= self._settings.heartbeat_interval or replica.silent:
                heartbeat = replica.heartbeat(timeout=self._settings.silence)
                heartbeat.call.when_done(self._wake)
                self._under_way[replica] = heartbeat
        elif heartbeat.call.done:
            del self._under_way[replica]
            self._handle(replica, heartbeat, now)
        elif silence > self._settings.silence:
            self._mark_silent(replica, silence)

    def _handle(self, replica: Replica, heartbeat: SessionCall, now: float) -> None:
        try:
            reply: HeartbeatReply = heartbeat.call.result()
            if reply.incarnation != replica.info.incarnation:
                raise StaleIncarnation(f"{replica.name} is incarnation {reply.incarnation[:8]} now")
        except (ConnectionLost, StaleIncarnation) as error:
            self._when_lost(replica, error)
        except UnknownSession:
            self._fleet.reopen(replica, heartbeat.session)
        except WaitTimeout:
            self._mark_silent(replica, now - self._last_answer[replica])
        except EagleRpcError as error:
            logger.warning("the heartbeat at %s failed: %s", replica.name, error)
        else:
            self._last_answer[replica] = now
            replica.draining = reply.draining
            if replica.silent:
                replica.silent = False
                logger.info("%s answers again", replica.name)

    def _mark_silent(self, replica: Replica, seconds: float) -> None:
        if not replica.silent:
            replica.silent = True
            logger.warning("%s has been silent for %.1f s; its requests go elsewhere", replica.name, seconds)
