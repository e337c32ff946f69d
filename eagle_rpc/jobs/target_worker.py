"""A worker that serves the target."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

import torch

from eagle_rpc.client import SERVICE_NAME
from eagle_rpc.config import Config
from eagle_rpc.errors import ConnectionLost
from eagle_rpc.jobs.permissions import CONTROL_METHODS
from eagle_rpc.rpc import StaticMembership, host, withdraw
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.target.model import HFEagle3TargetModel

logger = logging.getLogger(__name__)

READY = "ready"
DONE = "done"


@contextlib.contextmanager
def hosted_target(
    config: Config, device: torch.device, *, incarnation: str | None = None
) -> Iterator[TargetModelServer]:
    """Loads the target and hosts its server; when the body ends the queue is drained, the replies sent and the server closed."""
    target = HFEagle3TargetModel.load(
        config.target, device, cache_dir=config.run.cache_dir, seed=config.run.seed
    )
    server = TargetModelServer(target, config.target, incarnation=incarnation)
    host(SERVICE_NAME, server, CONTROL_METHODS)
    logger.info("serving %s", server.model_info().value.architecture)
    try:
        yield server
    finally:
        server.drain(config.rpc.drain_timeout)
        server.wait_sent(config.rpc.drain_timeout)
        answered = server.status().value["requests"]
        logger.info(
            "served: %s", ", ".join(f"{outcome} {count}" for outcome, count in answered.items()) or "nothing"
        )
        withdraw(SERVICE_NAME)
        server.close()


def serve_until_done(
    config: Config, device: torch.device, membership: StaticMembership, stop: threading.Event
) -> None:
    """The whole life of a target in a static job: it ends with the last trainer, or drained when it is told to stop.

    Raises `ConnectionLost` if all trainers have been silent for a lease's time: their agent may be on another host, so that
    nobody ends this one when they die.
    """
    with hosted_target(config, device) as server:
        membership.mark(READY)
        trainers = membership.cast.trainer_names
        abandoned = Abandonment(server, config.target.session_lease)
        membership.wait_for(trainers, DONE, timeout=None, until=lambda: stop.is_set() or abandoned.now())
        if membership.marked(trainers, DONE):
            return
        if stop.is_set():
            drain_for_trainers(config, server, membership)
        else:
            raise ConnectionLost(
                f"no trainer has been heard of for {config.target.session_lease:.0f} s (target.session_lease)"
            )


def drain_for_trainers(config: Config, server: TargetModelServer, membership: StaticMembership) -> None:
    """Takes no more work, and stays until the trainers are done, or are dead as well, or the drain's time is up."""
    logger.info("told to stop: draining for %.0f s at most", config.rpc.drain_timeout)
    membership.part()
    deadline = time.monotonic() + config.rpc.drain_timeout
    server.drain(config.rpc.drain_timeout)
    silence = config.rpc.heartbeat_interval * config.rpc.heartbeat_misses

    def nobody_left() -> bool:
        sessions = server.status().value["sessions"]
        heard = any(session["lease_left"] > config.target.session_lease - silence for session in sessions)
        return not heard or time.monotonic() >= deadline

    membership.wait_for(membership.cast.trainer_names, DONE, timeout=None, until=nobody_left)


class Abandonment:
    """Whether a server that had sessions has had none for `lease` seconds."""

    def __init__(self, server: TargetModelServer, lease: float) -> None:
        self._server = server
        self._lease = lease
        self._since: float | None = None  # the last time that a session was open

    def now(self) -> bool:
        if self._server.status().value["sessions"]:
            self._since = time.monotonic()
        return self._since is not None and time.monotonic() - self._since >= self._lease
