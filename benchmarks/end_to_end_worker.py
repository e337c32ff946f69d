"""Targets and trainers of `end_to_end.py` and `many_gpus.py`: in one process, or in several over RPC. They answer
questions in lines of JSON.

python -m end_to_end_worker colocated|target|trainer|elastic_target|elastic_trainer HYDRA_OVERRIDE...
"""

import contextlib
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
from lines import questions, say
from measuring import synchronise
from target_lab.serving import served_rate
from target_lab.work import full_batch, make_model
from workers import compose, connected, joined

from eagle_rpc.config import Config
from eagle_rpc.jobs.assembly import connect_target, join_group, make_draft
from eagle_rpc.jobs.elastic_worker import announced
from eagle_rpc.jobs.train import DONE, READY
from eagle_rpc.process import read_world, stop_signals
from eagle_rpc.process.startup import start_worker
from eagle_rpc.rpc import attempt_store
from eagle_rpc.service.lifecycle import TargetLifecycle
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import (
    Eagle3TargetBackend,
    Eagle3TargetBatch,
    SessionSettings,
    TokenBatch,
    VocabMapping,
)
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.topology import Role, assign_elastic_roles, resolve_device, resolve_devices
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.learner import Learner

# The loss mask's share of the tokens.
_SUPERVISED_SHARE = 0.9
# Different batches, which are repeated.
_NUM_BATCHES = 8
# Seconds between two looks at the forward thread.
_LOOK_SECONDS = 0.002


def token_batches(config: Config, vocab_size: int, rank: int) -> Iterator[TokenBatch]:
    """Random tokens [B, T], all of them real, others for each trainer."""
    generator = torch.Generator().manual_seed(config.run.seed + rank)
    shape = (config.train.batch_size, config.data.max_length)
    ids = [torch.randint(vocab_size, shape, generator=generator) for _ in range(_NUM_BATCHES)]
    masks = [(torch.rand(shape, generator=generator) < _SUPERVISED_SHARE).long() for _ in range(_NUM_BATCHES)]
    for one, mask in itertools.cycle(list(zip(ids, masks, strict=True))):
        yield TokenBatch(input_ids=one, attention_mask=torch.ones_like(one), loss_mask=mask)


def mapping_of(config: Config, vocab_size: int) -> VocabMapping:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)
    selected = torch.randperm(vocab_size, generator=generator)[: config.draft.vocab_size].sort().values
    return VocabMapping.from_token_ids(selected, vocab_size)


def train(config: Config, backend: Eagle3TargetBackend, device: torch.device, group: TrainerGroup) -> None:
    """For each question, trains the number of optimiser steps that it names and answers with times in seconds.

    With `kept` in the question, it does so on one batch of supervision, which is there: no target is asked.
    """
    shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
    backend.open_session(mapping_of(config, shape.vocab_size))
    draft = make_draft(config, shape, backend, device)
    learner = Learner(draft, config.train, config.draft, group, total_steps=config.train.max_steps)
    with contextlib.closing(backend.stream(token_batches(config, shape.vocab_size, group.rank))) as stream:

        def steps(count: int, batches: Iterator[Eagle3TargetBatch]) -> None:
            for _ in range(count):
                learner.learn(itertools.islice(batches, config.train.accumulation))
            synchronise(device)

        say(ready=True)
        for question in questions():
            batches = itertools.repeat(next(stream)) if question.get("kept") else stream
            # After warm-up as many requests are under way as during training.
            steps(question["warmups"], batches)
            started, waited = time.monotonic(), backend.totals.seconds_waited
            steps(question["steps"], batches)
            ended = time.monotonic()
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            say(started=started, ended=ended, waited=backend.totals.seconds_waited - waited, peak_bytes=peak)


def train_colocated(config: Config) -> None:
    start_worker(config, "colocated")
    device, supervision = torch.device(resolve_device(config.train.device)), config.supervision
    target = HFEagle3TargetModel.load(
        config.target, device, cache_dir=config.run.cache_dir, seed=config.run.seed
    )
    settings = SessionSettings(encoding=supervision.encoding.value, rows=supervision.rows.value)
    train(config, ColocatedEagle3TargetModel(target, config.target, settings), device, TrainerGroup())


def train_remote(config: Config) -> None:
    with (
        joined(config) as (membership, device),
        connected(config, membership, device) as backend,
        join_group(config, membership.cast, membership.store, device) as group,
    ):
        train(config, backend, device, group)


def train_elastic(config: Config) -> None:
    """A trainer of a job without targets, which finds them in the registry."""
    world, stop = read_world(), threading.Event()
    cast = assign_elastic_roles(Role.trainer, config.topology, world)
    name = cast.me.name
    start_worker(config, name)
    device = torch.device(resolve_device(config.train.device, local_rank=world.local_rank))
    store = attempt_store(world, timeout=config.rpc.start_timeout)
    shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
    with announced(config, name, Role.trainer, device, stop, when_superseded=stop.set) as membership:
        backend = connect_target(config, shape, None, device, cast, membership, stop)
        with contextlib.closing(backend), join_group(config, cast, store, device) as group:
            train(config, backend, device, group)


def serve(config: Config) -> None:
    """Answers a span of time with the share of it in which the forward thread had no work.

    A number of `requests` instead: with the target's tokens per second by itself, while no trainer asks it.
    """
    with joined(config) as (membership, _), contextlib.ExitStack() as stack:
        target = make_target(config)
        server = TargetModelServer(target, config.target)
        life = TargetLifecycle(server=server, config=config.rpc, stop=threading.Event())
        stack.enter_context(life.hosted())
        looks: list[tuple[float, int]] = []
        done = threading.Event()
        threading.Thread(target=watch, args=(server, looks, done.is_set), daemon=True).start()
        threading.Thread(target=answer, args=(looks, config, target), daemon=True).start()
        membership.mark(READY)
        membership.wait_for(membership.cast.trainer_names, DONE, timeout=math.inf)
        done.set()


def make_target(config: Config) -> HFEagle3TargetModel:
    """The target of this worker. On GPUs random weights are drawn where they belong, in seconds for large ones."""
    settings, number = config.target, config.topology.devices_per_target
    devices = resolve_devices(settings.device, number, local_rank=read_world().local_rank)
    if not settings.random or devices[0] == "cpu":
        return HFEagle3TargetModel.load(
            settings, *devices, cache_dir=config.run.cache_dir, seed=config.run.seed
        )
    model, spread = make_model(settings.random, settings.attention, [torch.device(one) for one in devices])
    kernels = {"fused_rows": settings.fused_rows, "fused_mlp": settings.fused_mlp}
    target = HFEagle3TargetModel(model, spread=spread, **kernels)
    if settings.compile_shapes:
        target.compile(settings.compile_shapes, packed=False, mode=settings.compile_mode)
    return target


def serve_elastic(config: Config) -> None:
    """A target of its own, which trainers find in the registry, until it is told to stop."""
    name = assign_elastic_roles(Role.target, config.topology, read_world()).me.name
    start_worker(config, name)
    with stop_signals() as stop:
        target = make_target(config)
        device = target.devices[-1]
        with announced(config, name, Role.target, device, stop, when_superseded=stop.set) as membership:
            server = TargetModelServer(target, config.target, incarnation=membership.me.incarnation)
            life = TargetLifecycle(
                server=server,
                config=config.rpc,
                stop=stop,
                when_serving=lambda: membership.report(server.status),
            )
            life.run()


def watch(server: TargetModelServer, looks: list[tuple[float, int]], done: Callable[[], bool]) -> None:
    while not done():
        # A GPU begins the next request before it has finished one.
        looks.append((time.monotonic(), min(1, server.status()["running"])))
        time.sleep(_LOOK_SECONDS)


def answer(looks: list[tuple[float, int]], config: Config, target: HFEagle3TargetModel) -> None:
    for span in questions():
        if "requests" in span:
            say(tokens_per_second=rate_alone(config, target, span["requests"]))
            continue
        seen = [running for moment, running in looks if span["started"] <= moment <= span["ended"]]
        say(idle_share=1 - sum(seen) / len(seen))


def rate_alone(config: Config, target: HFEagle3TargetModel, requests: int) -> float:
    """Tokens per second of the requests that trainers send, in a server whose queue is never empty."""
    vocab_size, device = target.model.config.get_text_config().vocab_size, target.devices[-1]
    shape = (config.train.batch_size, config.data.max_length)
    return served_rate(
        target,
        full_batch(*shape, vocab_size, _SUPERVISED_SHARE, device),
        mapping_of(config, vocab_size),
        encoding=config.supervision.encoding.value,
        chunk_rows=config.target.chunk_rows,
        requests=requests,
        device=device,
    )


ROLES = {
    "colocated": train_colocated,
    "target": serve,
    "trainer": train_remote,
    "elastic_target": serve_elastic,
    "elastic_trainer": train_elastic,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](compose(sys.argv[2:]))
