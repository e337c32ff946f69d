"""Targets as a service of their own: they serve trainers of any job that finds them in the registry, until they are told to stop."""

import contextlib
import logging
import threading

import torch

from eagle_rpc.config import Config
from eagle_rpc.errors import ConnectionLost, NameTaken
from eagle_rpc.jobs.elastic_worker import announced
from eagle_rpc.jobs.permissions import target_permissions
from eagle_rpc.jobs.registry import hosted_registry
from eagle_rpc.jobs.setting import ended_by, start_worker
from eagle_rpc.jobs.target_worker import Abandonment, hosted_target
from eagle_rpc.process import read_world, stop_signals
from eagle_rpc.topology import Role, assign_elastic_roles, resolve_device

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


def run(config: Config) -> int:
    """Returns 0 when it was told to stop and has drained. Raises what ends it otherwise, after draining as well."""
    world = read_world()
    cast = assign_elastic_roles(Role.target, config.topology, world)
    start_worker(config, cast.me.name, workers_on_host=world.local_size)
    device = torch.device(
        resolve_device(config.target.device, local_rank=world.local_rank, num_gpus=torch.cuda.device_count())
    )
    superseded = threading.Event()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        if config.rpc.host_registry and world.rank == 0:
            stack.enter_context(hosted_registry(config))
        stack.enter_context(ended_by(stop))
        permissions = target_permissions(config.rpc)
        membership = stack.enter_context(
            announced(
                config, cast.me.name, Role.target, device, permissions, stop, when_superseded=superseded.set
            )
        )
        server = stack.enter_context(hosted_target(config, device, incarnation=membership.me.incarnation))
        membership.report(lambda: server.status().value)
        unused = Abandonment(server, _POLL_SECONDS)
        while not stop.wait(_POLL_SECONDS):
            if not membership.reachable:
                raise ConnectionLost(
                    f"RPC no longer listens on {membership.me.url}: torch gives a port up when a peer connects and says nothing, "
                    "as a port scan does; start this target again"
                )
            if superseded.is_set():
                raise NameTaken(f"another process serves as {cast.me.name} now: this one drains and ends")
            if config.job.serve_until_unused and unused.now():
                logger.info("the last session has gone")
                break
        logger.info("draining for %.0f s at most", config.rpc.drain_timeout)
    return 0
