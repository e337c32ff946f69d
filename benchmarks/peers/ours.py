"""This package's target service, static (target and trainer in one job) and elastic (jobs of their own).

python -m peers.ours target|trainer WORK.json HYDRA_OVERRIDE...
"""

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import hydra
import torch
from peers.work import Side, Work, answer_commands
from torch import Tensor

from eagle_rpc.client import RemoteEagle3TargetModel
from eagle_rpc.config import Config
from eagle_rpc.config.choices import MembershipKind
from eagle_rpc.config.compose import conf_dir, register_schema, to_config
from eagle_rpc.jobs.assembly import connect_target
from eagle_rpc.jobs.elastic_worker import announced
from eagle_rpc.jobs.permissions import static_permissions, trainer_permissions
from eagle_rpc.jobs.train import DONE, READY, serve_until_done
from eagle_rpc.process import read_world
from eagle_rpc.process.startup import start_worker
from eagle_rpc.rpc import join_static
from eagle_rpc.supervision import Eagle3TargetBatch, TokenBatch, VocabMapping
from eagle_rpc.target.loading import load_target_config
from eagle_rpc.topology import DevicePlan, Role, assign_elastic_roles, assign_roles

# Rows whose probabilities are read at a time: as the loss does, so that they need not exist all at once.
_CHUNK_ROWS = 512
CPU = torch.device("cpu")


def overrides(work: Work) -> list[str]:
    """The work's target and client settings, as `python -m eagle_rpc` takes them."""
    return [
        *(f"++target.random.{name}={value}" for name, value in work.architecture.items()),
        f"target.aux_layer_ids=[{','.join(map(str, work.aux_layer_ids))}]",
        f"target.dtype={work.dtype}",
        "target.device=cpu",
        f"run.seed={work.seed}",
        f"run.dir={work.directory}/run",
        "run.threads=1",
        f"supervision.prefetch={work.prefetch}",
        f"draft.vocab_size={work.draft_vocab_size}",
    ]


def compose(overrides: list[str]) -> Config:
    register_schema()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(hydra.compose("config", overrides))


def serve_target(_work: Work, config: Config) -> None:
    """The target of a static job."""
    world = read_world()
    cast = assign_roles(config.topology, world)
    start_worker(config, cast.me.name)
    with join_static(
        cast, world, config.rpc, DevicePlan("cpu", {}), static_permissions(config.rpc)
    ) as membership:
        serve_until_done(config, CPU, membership, threading.Event())


def use_target(work: Work, config: Config) -> None:
    """A trainer that only reads what it is sent."""
    world, stop = read_world(), threading.Event()
    elastic = config.rpc.membership is MembershipKind.elastic
    cast = (
        assign_elastic_roles(Role.trainer, config.topology, world)
        if elastic
        else assign_roles(config.topology, world)
    )
    start_worker(config, cast.me.name)
    with contextlib.ExitStack() as stack:
        if elastic:
            permissions = trainer_permissions(config.rpc)
            joined = announced(
                config, cast.me.name, Role.trainer, CPU, permissions, stop, when_superseded=stop.set
            )
        else:
            joined = join_static(
                cast, world, config.rpc, DevicePlan("cpu", {}), static_permissions(config.rpc)
            )
        membership = stack.enter_context(joined)
        if not elastic:
            stack.callback(membership.mark, DONE)
            membership.wait_for(cast.target_names, READY, timeout=config.rpc.model_timeout)
        target_config = load_target_config(config.target, cache_dir=config.run.cache_dir)
        target = connect_target(config, target_config, None, CPU, cast, membership, stop)
        stack.callback(target.close)
        _answer(work, target)


def _answer(work: Work, target: RemoteEagle3TargetModel) -> None:
    _, selected_token_ids = work.load_tokens()
    target.open_session(VocabMapping.from_token_ids(selected_token_ids, work.vocab_size))

    def stream(batches: Iterable[dict[str, Tensor]]) -> Iterator[Eagle3TargetBatch]:
        return target.stream(TokenBatch(**batch) for batch in batches)

    answer_commands(work, Side(stream, _use, _dense))


def _use(batch: Eagle3TargetBatch) -> int:
    supervised = batch.supervised_rows.numel()
    chunks = range(0, supervised, _CHUNK_ROWS)
    mass = sum(float(batch.targets.probs(slice(start, start + _CHUNK_ROWS)).sum()) for start in chunks)
    assert abs(mass - supervised) < 1, "the probabilities of each supervised row sum up to 1"
    return supervised


def _dense(batch: Eagle3TargetBatch) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in ("target_probs", "position_mask", "aux_hidden_states")}


if __name__ == "__main__":
    role = {"target": serve_target, "trainer": use_target}[sys.argv[1]]
    role(Work.load(sys.argv[2]), compose([*overrides(Work.load(sys.argv[2])), *sys.argv[3:]]))
