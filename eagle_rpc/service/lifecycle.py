"""The life of a target in its process: it serves until there is a reason to end, drains, and closes."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConnectionLost, NameTaken, TargetFailed
from eagle_rpc.process.waiting import BoundedWait
from eagle_rpc.rpc import host, withdraw
from eagle_rpc.service.endpoint import CONTROL_METHODS, TargetEndpoint
from eagle_rpc.service.server import TargetModelServer

logger = logging.getLogger(__name__)

# Seconds between two looks for a reason to end.
_LOOK_INTERVAL = 0.2


@dataclass(kw_only=True)
class TargetLifecycle:
    """One target, from its first reply to its last."""

    server: TargetModelServer
    config: RpcConfig
    stop: threading.Event  # set when the process is told to stop
    when_serving: Callable[[], None] = lambda: None  # tells the trainers that the target serves
    when_stopped: Callable[[], None] = lambda: None  # tells the others that this worker leaves before them
    superseded: Callable[[], bool] = lambda: False  # whether another process serves under this name
    reachable: Callable[[], bool] = lambda: True  # whether trainers that come now can connect
    trainers_done: Callable[[], bool] | None = None  # all trainers of a static job; None: they come and go
    incomplete: Callable[[], str] = lambda: (
        ""
    )  # why the target can never serve again: a lost stage; empty: it can
    unused_after: float | None = None  # seconds without a session, after the first, that end it; None: never

    def run(self) -> None:
        """Serves until it is told to stop, the trainers are done, or no trainer is left; drains and closes.

        Raises after draining `NameTaken` if the target is superseded; `TargetFailed` if it can run no further
        pass; `ConnectionLost` if it is unreachable, or incomplete, or if the trainers of a static job, which may
        run on another host, are silent and not done.
        """
        with self.hosted():
            self.wait()

    def wait(self) -> None:
        """Waits for a reason to end. Raises as `run`, at once."""
        while not (reason := self._reason_to_end()):
            self.stop.wait(_LOOK_INTERVAL)
        logger.info("%s", reason)
        if self.stop.is_set():
            self.when_stopped()

    @contextlib.contextmanager
    def hosted(self) -> Iterator[None]:
        """Trainers reach the server while the body runs. Then it drains and closes, after errors as well."""
        server, seconds = self.server, self.config.drain_timeout
        host(TargetEndpoint(server), CONTROL_METHODS)
        logger.info("serving %s", server.model_info().architecture)
        try:
            self.when_serving()
            yield
        finally:
            logger.info("draining for %.0f s at most", seconds)
            drain = BoundedWait("the trainers to end", seconds)
            server.drain(drain.left)
            self._wait_for_trainers(drain)
            server.wait_sent(seconds)
            served = ", ".join(f"{outcome} {count}" for outcome, count in server.throughput.requests.items())
            logger.info("served: %s", served or "nothing")
            withdraw()
            server.close()

    def _reason_to_end(self) -> str:
        """Empty while there is none."""
        if lost := self.incomplete():
            raise ConnectionLost(f"this target has lost one of its stages and ends: {lost}")
        if self.trainers_done is not None and self.trainers_done():
            return "the trainers are done"
        if self.stop.is_set():
            return "told to stop"
        if self.server.failure is not None:
            raise TargetFailed(f"{self.server.failure}: start this target again")
        if not self.reachable():
            raise ConnectionLost(
                "RPC no longer listens on this target's port: torch gives a port up when a peer connects and "
                "says nothing, as a port scan does; start this target again"
            )
        if self.superseded():
            raise NameTaken("another process serves under this target's name now: this one drains and ends")
        if self.unused_after is None or self.server.sessions.seconds_unused < self.unused_after:
            return ""
        if self.trainers_done is None:
            return "the last session has ended"
        silence = f"no trainer has had a session for {self.unused_after:.0f} s"
        raise ConnectionLost(f"{silence} (target.session_lease)")

    def _wait_for_trainers(self, wait: BoundedWait) -> None:
        """Stays for the trainers of a static job, who cannot connect again, until they are done or silent."""
        silence = self.config.heartbeat_interval * self.config.heartbeat_misses
        while self.trainers_done is not None and not wait.over:
            if self.trainers_done() or not self.server.sessions.heard_within(silence):
                return
            wait.say()
            time.sleep(_LOOK_INTERVAL)
