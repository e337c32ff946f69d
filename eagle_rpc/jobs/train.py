"""Trains the draft: in a static job every worker of a torchrun comes here and plays its role, in an elastic one all are trainers."""

import contextlib
import threading

import torch

from eagle_rpc.config import Config
from eagle_rpc.config.choices import Membership
from eagle_rpc.config.compose import write_config
from eagle_rpc.jobs.elastic_worker import announced
from eagle_rpc.jobs.permissions import static_permissions, trainer_permissions
from eagle_rpc.jobs.setting import ended_by, planned_devices, run_directory, start_worker
from eagle_rpc.jobs.target_worker import DONE, READY, hosted_target, serve_until_done
from eagle_rpc.jobs.trainer_worker import train_until_done
from eagle_rpc.process import World, read_world, stop_signals
from eagle_rpc.rpc import StaticMembership, attempt_store, join_static
from eagle_rpc.topology import Cast, Role, assign_elastic_roles, assign_roles, resolve_device


def run(config: Config) -> int:
    """Returns 0 when training is done, or has stopped with a checkpoint because it was told to; errors are raised.

    1 if another process has taken this trainer's name over, which the log tells.
    """
    world = read_world()
    elastic = config.rpc.membership is Membership.elastic
    cast = (
        assign_elastic_roles(Role.trainer, config.topology, world)
        if elastic
        else assign_roles(config.topology, world)
    )
    start_worker(config, cast.me.name, workers_on_host=world.local_size)
    superseded = threading.Event()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        if cast.me.name == cast.trainer_names[0]:
            directory = run_directory(config)
            stack.enter_context(directory.claimed(config.train.resume))
            write_config(config, directory.config)
        stack.enter_context(ended_by(stop))
        if elastic:
            _train_elastic(config, cast, world, stop, superseded)
        else:
            _train_static(config, cast, world, stop)
    return int(superseded.is_set())


def _train_static(config: Config, cast: Cast, world: World, stop: threading.Event) -> None:
    devices = planned_devices(config, cast, world)
    device = torch.device(devices.device)
    with join_static(cast, world, config.rpc, devices, static_permissions(config.rpc)) as membership:
        if not cast.me.has(Role.trainer):
            serve_until_done(config, device, membership, stop)
            return
        with contextlib.ExitStack() as stack:
            if config.topology.single:
                stack.enter_context(hosted_target(config, device))
                membership.mark(READY)
            train_in_static_job(config, device, cast, membership, stop)


def train_in_static_job(
    config: Config, device: torch.device, cast: Cast, membership: StaticMembership, stop: threading.Event
) -> None:
    """Waits for the targets to load, trains, and tells them that it is done: they wait for that."""
    membership.wait_for(cast.target_names, READY, timeout=config.rpc.model_timeout, until=stop.is_set)
    if not stop.is_set():
        train_until_done(config, device, cast, membership, membership.store, stop)
    if stop.is_set():
        membership.part()
    membership.mark(DONE)


def _train_elastic(
    config: Config, cast: Cast, world: World, stop: threading.Event, superseded: threading.Event
) -> None:
    def give_way() -> None:
        superseded.set()
        stop.set()

    device = torch.device(
        resolve_device(config.train.device, local_rank=world.local_rank, num_gpus=torch.cuda.device_count())
    )
    store = attempt_store(world, timeout=config.rpc.start_timeout)
    permissions = trainer_permissions(config.rpc)
    with announced(
        config, cast.me.name, Role.trainer, device, permissions, stop, when_superseded=give_way
    ) as membership:
        train_until_done(config, device, cast, membership, store, stop)
