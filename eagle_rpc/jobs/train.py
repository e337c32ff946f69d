"""Trains the draft. The workers of a static job are targets and trainers, of an elastic one trainers."""

import contextlib
import threading
from collections.abc import Sequence

import torch
import torch.distributed as dist

from eagle_rpc.config import Config
from eagle_rpc.config.choices import MembershipKind
from eagle_rpc.config.compose import write_config
from eagle_rpc.errors import ConnectionLost
from eagle_rpc.jobs.elastic_worker import announced
from eagle_rpc.jobs.inputs import Inputs, load_inputs_once
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.jobs.serve import load_server
from eagle_rpc.jobs.stages import hand_over_bytes, stage_server, staged_server
from eagle_rpc.jobs.trainer import train_until_done
from eagle_rpc.jobs.watching import require_watching, target_watched
from eagle_rpc.process import World, read_world, stop_signals, tolerate_stop
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.process.startup import start_worker
from eagle_rpc.report.trackers import require_installed
from eagle_rpc.rpc import StaticMembership, attempt_store, gathered_store, join_static
from eagle_rpc.service.lifecycle import TargetLifecycle
from eagle_rpc.service.stage_chain import StageChain
from eagle_rpc.service.stage_lifecycle import StageLifecycle
from eagle_rpc.topology import Cast, DevicePlan, Role, assign_trainers, plan_devices, resolve_device

# Marks of the workers of a static job: the target is loaded; this trainer needs no target any more.
READY, DONE = "ready", "done"
# Mark of a target of several stages: its server is closed.
ENDED = "ended"


def run(config: Config) -> int:
    """Returns 0 when training is done, or was told to stop and has saved a checkpoint; errors are raised.

    Returns 1 if another process has taken over this trainer's name, which the log reports, and if the first
    trainer has found a mistake in the inputs, which it raises.
    """
    world = read_world()
    cast = assign_trainers(config, world)
    start_worker(config, cast.me.name, workers_on_host=world.local_size)
    if cast.me.name in cast.trainer_names:
        require_installed(config.report.trackers)
    require_watching(config)
    superseded = threading.Event()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        if cast.me.name == cast.trainer_names[0]:
            directory = RunDirectory.of(config)
            stack.enter_context(directory.claimed(config.train.resume))
            write_config(config, directory.config)
        stack.enter_context(tolerate_stop(stop))
        static = config.rpc.membership is MembershipKind.static
        if static and config.topology.devices_per_target * config.topology.stages_per_target > 1:
            # Too few GPUs are told before any input is read.
            job_devices(config, cast, world)
        seconds = config.rpc.start_timeout
        store = (
            attempt_store(world, timeout=seconds)
            if static
            else gathered_store(world, timeout=seconds, stop=stop)
        )
        loaded = load_inputs_once(config, cast, store, stop)
        if loaded is None:
            return int(not stop.is_set())
        config, inputs = loaded
        if static:
            _train_static(config, inputs, cast, world, stop)
        else:
            assert inputs is not None, "an elastic job has trainers only"
            _train_elastic(config, inputs, cast, world, store, stop, superseded)
    return int(superseded.is_set())


def _train_static(
    config: Config, inputs: Inputs | None, cast: Cast, world: World, stop: threading.Event
) -> None:
    devices = job_devices(config, cast, world)
    device = torch.device(devices.device)
    permitted = permissions(config.rpc, None, hand_over_bytes=hand_over_bytes(config))
    with join_static(cast, world, config.rpc, devices, permitted) as membership:
        if inputs is None:
            serve_until_done(config, devices.devices, membership, stop)
            return
        with contextlib.ExitStack() as stack:
            if config.topology.single:
                server, serving = load_server(config, [device]), lambda: membership.mark(READY)
                life = TargetLifecycle(server=server, config=config.rpc, stop=stop, when_serving=serving)
                stack.enter_context(life.hosted())
            membership.wait_for(cast.target_names, READY, timeout=config.rpc.model_timeout, stop=stop)
            if not stop.is_set():
                train_until_done(config, inputs, device, cast, membership, membership.store, stop)
            if stop.is_set():
                membership.announce_leaving()
            membership.mark(DONE)


def job_devices(config: Config, cast: Cast, world: World) -> DevicePlan:
    """The devices of the workers of a static job."""
    return plan_devices(
        cast,
        world,
        target=config.target.device,
        trainer=config.train.device,
        devices_per_target=config.topology.devices_per_target,
    )


def serve_until_done(
    config: Config,
    devices: Sequence[torch.device | str],
    membership: StaticMembership,
    stop: threading.Event,
) -> None:
    """The whole life of a target, or of a stage of one, in a static job.

    Raises as `TargetLifecycle.run` or `StageLifecycle.run`.
    """
    cast, rpc = membership.cast, config.rpc
    if cast.me.has(Role.stage):
        _serve_stage(config, devices, membership, stop)
        return
    with contextlib.ExitStack() as stack:
        chain: StageChain | None = None
        if stages := cast.stages_of(cast.me.name):
            stack.callback(membership.mark, ENDED)
            membership.wait_for(stages, READY, timeout=rpc.model_timeout, stop=stop)
            staged = staged_server(config, cast.me.name, devices, membership, stop)
            server, chain = stack.enter_context(staged)
        else:
            server = load_server(config, devices)
        stack.enter_context(target_watched(config, cast, server))
        TargetLifecycle(
            server=server,
            config=rpc,
            stop=stop,
            when_serving=lambda: membership.mark(READY),
            when_stopped=membership.announce_leaving,
            trainers_done=lambda: membership.marked(cast.trainer_names, DONE),
            incomplete=lambda: "" if chain is None else chain.lost,
            unused_after=config.target.session_lease,
        ).run()


def _serve_stage(
    config: Config,
    devices: Sequence[torch.device | str],
    membership: StaticMembership,
    stop: threading.Event,
) -> None:
    me = membership.cast.me
    StageLifecycle(
        server=stage_server(config, me, devices, membership, incarnation=me.name),
        config=config.rpc,
        stop=stop,
        when_serving=lambda: membership.mark(READY),
        when_stopped=membership.announce_leaving,
        target_ended=lambda: membership.marked([f"target{me.index}"], ENDED),
        unattended_after=config.rpc.model_timeout,
    ).run()


def _train_elastic(
    config: Config,
    inputs: Inputs,
    cast: Cast,
    world: World,
    store: dist.Store,
    stop: threading.Event,
    superseded: threading.Event,
) -> None:
    def give_way() -> None:
        superseded.set()
        stop.set()

    device = torch.device(
        resolve_device(config.train.device, field="train.device", local_rank=world.local_rank)
    )
    with announced(config, cast.me.name, Role.trainer, device, stop, when_superseded=give_way) as membership:
        others_leave = train_until_done(config, inputs, device, cast, membership, store, stop)
    # Of several agents of torchrun one leaves: those that remain start their trainers again.
    if others_leave and world.num_agents > 1 and world.restart_count < world.max_restarts:
        raise ConnectionLost("another trainer was told to stop; torchrun starts those that remain again")
