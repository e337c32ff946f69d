"""Targets as a service of their own: they serve the trainers of any job that finds them in the registry."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch

from eagle_rpc.config import Config
from eagle_rpc.jobs.answering import EngineAnswering
from eagle_rpc.jobs.elastic_worker import announced
from eagle_rpc.jobs.registry import hosted_registry
from eagle_rpc.jobs.stages import stage_server, staged_server
from eagle_rpc.jobs.watching import require_watching, target_watched
from eagle_rpc.process import read_world, stop_signals, tolerate_stop
from eagle_rpc.process.startup import start_worker
from eagle_rpc.rpc import ElasticMembership
from eagle_rpc.service.lifecycle import TargetLifecycle
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.service.stage_lifecycle import StageLifecycle
from eagle_rpc.target.engines import load_any_target
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.topology import Role, Worker, assign_elastic_roles, resolve_devices

# Seconds that `job.serve_until_unused` leaves a trainer between two sessions.
_UNUSED_SECONDS = 0.2


def run(config: Config) -> int:
    """Returns 0 when it was told to stop and has drained. Raises as `TargetLifecycle.run`."""
    world = read_world()
    cast = assign_elastic_roles(Role.target, config.topology, world)
    me = cast.me
    start_worker(config, me.name, workers_on_host=world.local_size)
    require_watching(config)
    devices = resolve_devices(
        config.target.device, config.topology.devices_per_target, local_rank=world.local_rank
    )
    hosts_registry = config.rpc.host_registry and world.rank == 0
    with stop_signals() as stop, tolerate_stop(stop):
        if me.has(Role.target):
            with (
                elastic_target(config, me.name, devices, stop, hosts_registry=hosts_registry) as life,
                target_watched(config, cast, life.server),
            ):
                life.run()
        else:
            with elastic_stage(config, me, devices, stop, hosts_registry=hosts_registry) as stage:
                stage.run()
    return 0


@contextlib.contextmanager
def elastic_target(
    config: Config,
    name: str,
    devices: Sequence[torch.device | str],
    stop: threading.Event,
    *,
    hosts_registry: bool,
) -> Iterator[TargetLifecycle]:
    """The target, loaded over `devices`, in the registry while the body runs, which makes it serve.

    Raises the errors of `announced` and `load_server`, and of `hosted_registry` if it runs the registry too.
    """
    # Supervision leaves from the last device.
    device = torch.device(devices[-1])
    with (
        _in_registry(config, name, Role.target, device, stop, hosts_registry) as (membership, superseded),
        _elastic_server(config, name, devices, membership, stop) as server,
    ):
        yield TargetLifecycle(
            server=server,
            config=config.rpc,
            stop=stop,
            when_serving=lambda: membership.report(server.status),
            superseded=superseded.is_set,
            reachable=lambda: membership.reachable,
            unused_after=_UNUSED_SECONDS if config.job.serve_until_unused else None,
        )


@contextlib.contextmanager
def _in_registry(
    config: Config, name: str, role: Role, device: torch.device, stop: threading.Event, hosts_registry: bool
) -> Iterator[tuple[ElasticMembership, threading.Event]]:
    """The membership of this worker, and an event that is set once another process serves under its name."""
    superseded = threading.Event()
    give_way = superseded.set
    with (
        hosted_registry(config) if hosts_registry else contextlib.nullcontext(),
        announced(config, name, role, device, stop, when_superseded=give_way) as membership,
    ):
        yield membership, superseded


@contextlib.contextmanager
def _elastic_server(
    config: Config,
    name: str,
    devices: Sequence[torch.device | str],
    membership: ElasticMembership,
    stop: threading.Event,
) -> Iterator[TargetModelServer]:
    incarnation = membership.me.incarnation
    if config.topology.stages_per_target == 1:
        yield load_server(config, devices, incarnation=incarnation)
        return
    # A stage that is lost may return: the server takes no requests meanwhile, and sessions live on.
    with staged_server(config, name, devices, membership, stop, incarnation=incarnation) as (server, _):
        yield server


@contextlib.contextmanager
def elastic_stage(
    config: Config,
    me: Worker,
    devices: Sequence[torch.device | str],
    stop: threading.Event,
    *,
    hosts_registry: bool,
) -> Iterator[StageLifecycle]:
    """A stage behind the first one of its target, as `elastic_target`."""
    device = torch.device(devices[0])
    with _in_registry(config, me.name, Role.stage, device, stop, hosts_registry) as (membership, superseded):
        server = stage_server(config, me, devices, membership, incarnation=membership.me.incarnation)
        yield StageLifecycle(
            server=server,
            config=config.rpc,
            stop=stop,
            when_serving=lambda: membership.report(server.status),
            superseded=superseded.is_set,
            reachable=lambda: membership.reachable,
        )


def load_server(
    config: Config, devices: Sequence[torch.device | str], *, incarnation: str | None = None
) -> TargetModelServer:
    """The server of the target that the configuration names, over `devices`."""
    target = load_any_target(config.target, *devices, cache_dir=config.run.cache_dir, seed=config.run.seed)
    answering = EngineAnswering(target.model) if isinstance(target, HFEagle3TargetModel) else None
    return TargetModelServer(target, config.target, incarnation=incarnation, answering=answering)
