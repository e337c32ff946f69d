"""A trainer's heartbeats at its targets: they keep the sessions' leases, and tell who is silent, draining or gone."""

import logging
from collections.abc import Callable

from eagle_rpc.client.fleet import Fleet
from eagle_rpc.client.replica import Attempt, Replica
from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.errors import ConnectionLost, EagleRpcError, StaleIncarnation, UnknownSession, WaitTimeout
from eagle_rpc.supervision import Pulse

logger = logging.getLogger(__name__)


class Heartbeats:
    """One heartbeat under way a replica. Never waits: `tick` is called often, `wake` when an answer has come."""

    def __init__(
        self,
        fleet: Fleet,
        settings: ClientSettings,
        *,
        wake: Callable[[], None],
        when_lost: Callable[[Replica, EagleRpcError], None],
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._wake = wake
        self._when_lost = when_lost
        self._under_way: dict[Replica, Attempt] = {}
        self._last_answer: dict[Replica, float] = {}  # time.monotonic; of a newcomer, when it came

    def tick(self, now: float) -> None:
        """Takes answers in, sends what is due, and notices silence; `now` is of time.monotonic."""
        replicas = self._fleet.replicas()
        for gone in self._last_answer.keys() - set(replicas):
            del self._last_answer[gone]
            self._under_way.pop(gone, None)
        for replica in replicas:
            if replica.session is not None:
                self._tick(replica, now)

    def _tick(self, replica: Replica, now: float) -> None:
        silence = now - self._last_answer.setdefault(replica, now)
        beat = self._under_way.get(replica)
        if beat is not None and beat.call.done:
            del self._under_way[replica]
            self._take_in(replica, beat, now)
        elif beat is not None and silence > self._settings.silence:
            self._mark_silent(replica, silence)
        elif beat is None and (silence >= self._settings.heartbeat_interval or replica.silent):
            beat = replica.beat(timeout=self._settings.silence)
            beat.call.when_done(self._wake)
            self._under_way[replica] = beat

    def _take_in(self, replica: Replica, beat: Attempt, now: float) -> None:
        try:
            pulse: Pulse = beat.call.result()
        except (ConnectionLost, StaleIncarnation) as error:
            self._when_lost(replica, error)
        except UnknownSession:
            self._fleet.renew(replica, beat.session)
        except WaitTimeout:
            self._mark_silent(replica, now - self._last_answer[replica])
        except EagleRpcError as error:
            logger.warning("the heartbeat at %s failed: %s", replica.name, error)
        else:
            if pulse.incarnation != replica.info.incarnation:
                self._when_lost(
                    replica, StaleIncarnation(f"{replica.name} is incarnation {pulse.incarnation[:8]} now")
                )
                return
            self._last_answer[replica] = now
            replica.draining = pulse.draining
            if replica.silent:
                replica.silent = False
                logger.info("%s answers again", replica.name)

    def _mark_silent(self, replica: Replica, seconds: float) -> None:
        if not replica.silent:
            replica.silent = True
            logger.warning("%s has been silent for %.1f s; its requests go elsewhere", replica.name, seconds)
