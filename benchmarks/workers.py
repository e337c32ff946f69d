"""This package's workers as benchmarks run them: settings, static jobs and connections to a target."""

import contextlib
import threading
from collections.abc import Iterator

import processes  # It puts `support` on the path.
import torch
from support.trainer import compose, elastic_trainer

from eagle_rpc.client import RemoteEagle3TargetModel
from eagle_rpc.config import Config
from eagle_rpc.jobs.assembly import connect_target
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.jobs.train import DONE, READY, job_devices
from eagle_rpc.process import read_world
from eagle_rpc.process.startup import start_worker
from eagle_rpc.rpc import StaticMembership, join_static
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.topology import assign_roles

__all__ = ["compose", "connected", "elastic_trainer", "joined", "processes"]


@contextlib.contextmanager
def joined(config: Config) -> Iterator[tuple[StaticMembership, torch.device]]:
    """Joins the static job that torchrun's environment describes; yields this worker's device too."""
    world = read_world()
    cast = assign_roles(config.topology, world)
    start_worker(config, cast.me.name)
    devices = job_devices(config, cast, world)
    device = torch.device(devices.device)
    if device.type == "cuda":
        # Before RPC, which looks for devices when it starts.
        torch.zeros(1, device=device)
    with join_static(cast, world, config.rpc, devices, permissions(config.rpc, None)) as membership:
        yield membership, device


@contextlib.contextmanager
def connected(
    config: Config, membership: StaticMembership, device: torch.device
) -> Iterator[RemoteEagle3TargetModel]:
    """The static job's target, when it is ready. Afterwards the target may end."""
    membership.wait_for(membership.cast.target_names, READY, timeout=config.rpc.model_timeout)
    shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
    stop = threading.Event()
    target = connect_target(config, shape, None, device, membership.cast, membership, stop)
    with contextlib.closing(target):
        yield target
    membership.mark(DONE)
