"""Targets of several processes: the first stage with its server, and the stages behind it."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from eagle_rpc.config import Config
from eagle_rpc.config.texts import parse_pair
from eagle_rpc.errors import ConnectionLost
from eagle_rpc.rpc import Link, Membership
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.service.stage_chain import StageChain
from eagle_rpc.service.stage_server import StageServer
from eagle_rpc.service.staged_target import StagedPasses, StagedTarget
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.topology import Worker, stage_name


@contextlib.contextmanager
def staged_server(
    config: Config,
    name: str,
    devices: Sequence[torch.device | str],
    membership: Membership,
    stop: threading.Event,
    *,
    incarnation: str | None = None,
) -> Iterator[tuple[TargetModelServer, StageChain]]:
    """The server of the target `name`, whose first stage is loaded over `devices`, once all stages are there.

    Raises `WaitTimeout` if they are not within `rpc.model_timeout`, or once `stop` is set; `TargetMismatch` for
    stages of another model.
    """
    first = load_stage(config, 0, devices)
    chain = StageChain(name, first.stage_info(), membership, config.rpc)
    with contextlib.closing(chain):
        chain.form(stop)
        server = TargetModelServer(
            StagedTarget(first, chain),
            config.target,
            incarnation=incarnation,
            passes=StagedPasses(first, chain, config.rpc),
        )
        chain.when_lost, chain.when_whole = server.pause, server.resume
        if chain.lost:
            server.pause(chain.lost)
        yield server, chain


def stage_server(
    config: Config,
    me: Worker,
    devices: Sequence[torch.device | str],
    membership: Membership,
    *,
    incarnation: str,
) -> StageServer:
    """The server of a stage behind the first one, loaded over `devices`."""
    is_last = me.stage == config.topology.stages_per_target - 1
    return StageServer(
        load_stage(config, me.stage, devices),
        config.target,
        incarnation=incarnation,
        connect_next=None if is_last else next_stage(me, membership),
        pass_seconds=config.rpc.request_timeout,
    )


def load_stage(config: Config, number: int, devices: Sequence[torch.device | str]) -> HFEagle3TargetModel:
    return HFEagle3TargetModel.load(
        config.target,
        *devices,
        cache_dir=config.run.cache_dir,
        seed=config.run.seed,
        stage=(number, config.topology.stages_per_target),
    )


def next_stage(me: Worker, membership: Membership) -> Callable[[str], Link]:
    """Connects to the stage behind this one, if it is of the given incarnation."""
    target = f"target{me.index}"
    name = stage_name(target, me.stage + 1)
    links: list[Link] = []

    def connect(incarnation: str) -> Link:
        while links:
            # The way to a stage that has died is of no use, and one to a living stage is found again.
            membership.leave(links.pop(), lost=False)
        found = [
            one for one in membership.stages(target) if (one.name, one.incarnation) == (name, incarnation)
        ]
        if not found:
            raise ConnectionLost(f"{name} of incarnation {incarnation[:8]} does not serve")
        links.append(membership.connect(found[0]))
        return links[0]

    return connect


def hand_over_bytes(config: Config) -> int:
    """Bytes of the largest message between two stages: hidden states of the largest request; 0 without stages."""
    if config.topology.stages_per_target == 1:
        return 0
    shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
    tokens = config.target.max_batch_tokens
    # Compiled shapes add padding.
    for batch, length in map(parse_pair, config.target.compile_shapes):
        tokens = max(tokens, 2 * batch * length)
    return tokens * shape.hidden_size * getattr(torch, config.target.dtype.value).itemsize + 2**20
