"""A worker that serves the target."""

import contextlib
import logging
from collections.abc import Iterator

import torch

from eagle_rpc.client import SERVICE_NAME
from eagle_rpc.config import Config
from eagle_rpc.rpc import StaticMembership, host, withdraw
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.server import TargetModelServer

logger = logging.getLogger(__name__)

READY = "ready"
DONE = "done"


@contextlib.contextmanager
def hosted_target(config: Config, device: torch.device, membership: StaticMembership) -> Iterator[TargetModelServer]:
    """Loads the target, hosts its server and tells the others; when the body ends the queue is drained and the server closed."""
    target = HFEagle3TargetModel.load(config.target, device, cache_dir=config.run.cache_dir, seed=config.run.seed)
    server = TargetModelServer(target, config.target)
    host(SERVICE_NAME, server)
    membership.mark(READY)
    logger.info("serving %s", server.model_info().value.architecture)
    try:
        yield server
    finally:
        server.drain(config.rpc.shutdown_timeout)
        logger.info("served: %s", ", ".join(f"{name} {count}" for name, count in server.stats().value.items()))
        withdraw(SERVICE_NAME)
        server.close()


def serve_until_done(config: Config, device: torch.device, membership: StaticMembership) -> None:
    """The whole life of a target in a static job: it ends with the last trainer. A trainer that dies takes the job with it."""
    with hosted_target(config, device, membership):
        membership.wait_for(membership.cast.trainer_names, DONE, timeout=None)
