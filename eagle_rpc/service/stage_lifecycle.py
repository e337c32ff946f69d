"""The life of a stage behind the first one, in its process: it serves first stages until there is a reason to end."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConnectionLost, NameTaken
from eagle_rpc.process.waiting import BoundedWait
from eagle_rpc.rpc import host, withdraw
from eagle_rpc.service.endpoint import STAGE_METHODS, StageEndpoint
from eagle_rpc.service.stage_server import StageServer

logger = logging.getLogger(__name__)

_LOOK_INTERVAL = 0.2  # seconds between two looks for a reason to end


@dataclass(kw_only=True)
class StageLifecycle:
    """One stage. In an elastic service it outlives its first stage and serves the next one."""

    server: StageServer
    config: RpcConfig
    stop: threading.Event  # set when the process is told to stop
    when_serving: Callable[[], None]  # tells the first stage that this one serves
    when_stopped: Callable[[], None] = lambda: None  # tells the others that this worker leaves before them
    superseded: Callable[[], bool] = lambda: False  # whether another process serves under this name
    reachable: Callable[[], bool] = lambda: True  # whether a first stage that comes now can connect
    target_ended: Callable[[], bool] = lambda: False  # whether the first stage of a static job has ended
    unattended_after: float | None = (
        None  # seconds without a first stage that end it; null: it waits for ever
    )

    def run(self) -> None:
        """Serves until it is told to stop or its target has ended.

        Raises `NameTaken` if it is superseded; `ConnectionLost` if it is unreachable, or if the first stage of a
        static job, which may run on another host, is silent.
        """
        host(StageEndpoint(self.server), STAGE_METHODS)
        logger.info("serving as a stage")
        try:
            self.when_serving()
            while not self._ends():
                self.stop.wait(_LOOK_INTERVAL)
        finally:
            self._drain()
            logger.info("served: %d passes", self.server.num_passes)
            withdraw()
            self.server.close()

    def _ends(self) -> bool:
        if self.target_ended():
            logger.info("the first stage has ended")
            return True
        if self.stop.is_set():
            logger.info("told to stop")
            self.when_stopped()
            return True
        if not self.reachable():
            raise ConnectionLost("RPC no longer listens on this stage's port: start this stage again")
        if self.superseded():
            raise NameTaken("another process serves under this stage's name now: this one ends")
        silent = self.server.seconds_unattended
        if self.unattended_after is not None and silent > self.unattended_after:
            raise ConnectionLost(f"the first stage has been silent for {silent:.0f} s")
        return False

    def _drain(self) -> None:
        """Lets the first stage see that this one ends, and finishes the passes under way."""
        self.server.draining = True
        wait = BoundedWait("passes under way to end", self.config.drain_timeout)
        seen = 2 * self.config.heartbeat_interval
        while not (wait.over or self.target_ended()) and self.server.seconds_unattended < seen:
            if wait.elapsed > seen and self.server.is_idle:
                return
            wait.say()
            threading.Event().wait(_LOOK_INTERVAL)
