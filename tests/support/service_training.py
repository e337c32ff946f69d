"""Trainers and their target in processes of their own; supervision arrives while collectives run."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from support.tiny_target import DRAFT_VOCAB_SIZE, TINY_LLAMA, tiny_batch, tiny_mapping, tiny_target_config
from support.workers import TEST_RPC

from eagle_rpc.client.dispatcher import PendingRequest
from eagle_rpc.config import Config
from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import DraftConfig, RunConfig, TopologyConfig, TrainConfig
from eagle_rpc.jobs.assembly import connect_target, join_group, make_draft
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.jobs.train import DONE, READY, job_devices, serve_until_done
from eagle_rpc.process import read_world
from eagle_rpc.rpc import StaticMembership, join_static
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.topology import Role, assign_roles
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.learner import Learner

ACCUMULATION = 2
GroupMaker = Callable[
    [Config, StaticMembership, torch.device], contextlib.AbstractContextManager[TrainerGroup]
]


def service_config(device: str, trainers: int, **train: Any) -> Config:
    """One tiny target and `trainers`; on a GPU its heads are wide enough for the fused step."""
    wide = {"hidden_size": 256, "intermediate_size": 512} if device != "cpu" else {}
    dtype = DType.float32 if device == "cpu" else DType.bfloat16
    return Config(
        run=RunConfig(name="test", dir="unused", cache_dir="unused"),
        topology=TopologyConfig(targets=1, trainers=trainers),
        rpc=TEST_RPC,
        target=tiny_target_config(random={**TINY_LLAMA, **wide}, dtype=dtype, device=device),
        draft=DraftConfig(vocab_size=DRAFT_VOCAB_SIZE, ttt_steps=3),
        train=TrainConfig(accumulation=ACCUMULATION, device=device, **train),
    )


def all_trainers(config: Config, membership: StaticMembership, device: torch.device) -> Any:
    return join_group(config, membership.cast, membership.store, device)


def take_part(config: Config, steps: int, group_of: GroupMaker = all_trainers) -> dict[str, Any] | None:
    """One process of the job: a target that serves, or a trainer of `steps` steps, which returns its weights'
    digest.
    """
    torch.set_num_threads(1)
    world = read_world()
    cast = assign_roles(config.topology, world)
    devices = job_devices(config, cast, world)
    device = torch.device(devices.device)
    with join_static(cast, world, config.rpc, devices, permissions(config.rpc, None)) as membership:
        if cast.me.has(Role.target):
            serve_until_done(config, devices.devices, membership, threading.Event())
            return None
        membership.wait_for(cast.target_names, READY, timeout=config.rpc.model_timeout)
        try:
            with group_of(config, membership, device) as group:
                return _train(config, membership, device, group, steps)
        finally:
            membership.mark(DONE)


def _train(
    config: Config, membership: StaticMembership, device: torch.device, group: TrainerGroup, steps: int
) -> dict[str, Any]:
    shape = load_target_shape(config.target, cache_dir="unused")
    backend = connect_target(config, shape, None, device, membership.cast, membership, threading.Event())
    with contextlib.closing(backend):
        backend.open_session(tiny_mapping())
        draft = make_draft(config, shape, backend, device)
        learner = Learner(draft, config.train, config.draft, group, total_steps=steps)
        seeds = itertools.count(group.rank, group.size)
        with (
            contextlib.closing(
                backend.stream(tiny_batch(seed, batch=4, length=48) for seed in seeds)
            ) as stream,
            arrivals(membership),
        ):
            for step in range(steps):
                if group.size > 1 and group.rank == 0:
                    hold_back(learner, membership, step)
                learner.learn(itertools.islice(stream, ACCUMULATION))
        return {
            "digest": learner.digest(),
            "between_gpus": [one.link.between_gpus for one in backend._fleet.replicas()],
        }


@contextlib.contextmanager
def arrivals(membership: StaticMembership) -> Iterator[None]:
    """Sets a mark in the store for every reply that this trainer receives."""
    complete, numbers = PendingRequest.complete, itertools.count(1)

    def marked(request, reply, trip):
        complete(request, reply, trip)
        membership.mark(f"arrival {next(numbers)}")

    PendingRequest.complete = marked
    try:
        yield
    finally:
        PendingRequest.complete = complete


def hold_back(learner: Learner, membership: StaticMembership, step: int) -> None:
    """Joins the sum of gradients only when all trainers have the next step's supervision; the others wait in
    the sum.
    """
    reduce = type(learner._masters).reduce_gradients

    def held_back() -> None:
        arrived = ACCUMULATION * (step + 2)
        membership.wait_for(membership.cast.trainer_names, f"arrival {arrived}", timeout=60)
        reduce(learner._masters)

    learner._masters.reduce_gradients = held_back
