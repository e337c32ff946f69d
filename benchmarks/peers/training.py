"""Target and trainer of an end-to-end run: in one process, or in two over RPC. Told what to do in lines of JSON on stdin.

python -m peers.training colocated|target|trainer HYDRA_OVERRIDE...
"""

import contextlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
from peers.ours import compose

from eagle_rpc.client import SERVICE_NAME
from eagle_rpc.config import Config
from eagle_rpc.jobs.assembly import connect_target, make_draft
from eagle_rpc.jobs.permissions import static_permissions
from eagle_rpc.jobs.serve import load_server
from eagle_rpc.jobs.train import DONE, READY
from eagle_rpc.process import read_world
from eagle_rpc.process.startup import start_worker
from eagle_rpc.rpc import StaticMembership, join_static
from eagle_rpc.service.lifecycle import TargetLifecycle
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import Eagle3TargetBackend, SessionSettings, TokenBatch, VocabMapping
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.loading import load_target_config
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.topology import assign_roles, plan_devices, resolve_device
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.learner import Learner

# Of the tokens, those that the loss mask selects.
_SUPERVISED_SHARE = 0.9
# Different batches, which come again and again.
_NUM_BATCHES = 8
# Seconds between two looks at the forward thread.
_LOOK_SECONDS = 0.002


def say(answer: dict[str, float]) -> None:
    print(json.dumps(answer), flush=True)


def token_batches(config: Config, vocab_size: int) -> Iterator[TokenBatch]:
    """Random tokens [B, T], all of them real."""
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (config.train.batch_size, config.data.max_length)
    ids = [torch.randint(vocab_size, shape, generator=generator) for _ in range(_NUM_BATCHES)]
    masks = [(torch.rand(shape, generator=generator) < _SUPERVISED_SHARE).long() for _ in range(_NUM_BATCHES)]
    for one, mask in itertools.cycle(list(zip(ids, masks, strict=True))):
        yield TokenBatch(input_ids=one, attention_mask=torch.ones_like(one), loss_mask=mask)


def train(config: Config, backend: Eagle3TargetBackend, device: torch.device) -> None:
    """Runs as many optimiser steps as each line of stdin says, until stdin ends."""
    target_config = load_target_config(config.target, cache_dir=config.run.cache_dir)
    vocab_size = target_config.vocab_size
    selected_token_ids = (
        torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))[: config.draft.vocab_size]
        .sort()
        .values
    )
    backend.open_session(VocabMapping.from_token_ids(selected_token_ids, vocab_size))
    draft = make_draft(config, target_config, backend, device)
    learner = Learner(draft, config.train, config.draft, TrainerGroup(), total_steps=config.train.max_steps)
    with contextlib.closing(backend.stream(token_batches(config, vocab_size))) as stream:

        def steps(count: int) -> None:
            for _ in range(count):
                learner.learn(itertools.islice(stream, config.train.accumulation))
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        say({"ready": True})
        for line in sys.stdin:
            command = json.loads(line)
            # The requests under way are those of a trainer in full swing when the clock starts.
            steps(command["warmups"])
            started, waited = time.monotonic(), backend.seconds_waited
            steps(command["steps"])
            ended = time.monotonic()
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            say(
                {
                    "started": started,
                    "ended": ended,
                    "waited": backend.seconds_waited - waited,
                    "peak_bytes": peak,
                }
            )


def train_colocated(config: Config) -> None:
    start_worker(config, "colocated")
    device = torch.device(resolve_device(config.train.device))
    target = HFEagle3TargetModel.load(
        config.target, device, cache_dir=config.run.cache_dir, seed=config.run.seed
    )
    supervision = config.supervision
    train(
        config,
        ColocatedEagle3TargetModel(
            target,
            config.target,
            SessionSettings(encoding=supervision.encoding.value, rows=supervision.rows.value),
        ),
        device,
    )


@contextlib.contextmanager
def joined(config: Config) -> Iterator[tuple[StaticMembership, torch.device]]:
    world = read_world()
    cast = assign_roles(config.topology, world)
    start_worker(config, cast.me.name)
    devices = plan_devices(cast, world, target=config.target.device, trainer=config.train.device)
    with join_static(cast, world, config.rpc, devices, static_permissions(config.rpc)) as membership:
        yield membership, torch.device(devices.device)


def train_remote(config: Config) -> None:
    with joined(config) as (membership, device):
        membership.wait_for(membership.cast.target_names, READY, timeout=config.rpc.model_timeout)
        target_config = load_target_config(config.target, cache_dir=config.run.cache_dir)
        backend = connect_target(
            config, target_config, None, device, membership.cast, membership, threading.Event()
        )
        with contextlib.closing(backend):
            train(config, backend, device)
        membership.mark(DONE)


def serve(config: Config) -> None:
    """Answers each line of stdin, two moments, by the share of the time between them in which the forward thread had no work."""
    with joined(config) as (membership, device), contextlib.ExitStack() as stack:
        server = load_server(config, device)
        life = TargetLifecycle(server=server, service=SERVICE_NAME, config=config.rpc, stop=threading.Event())
        stack.enter_context(life.hosted())
        looks: list[tuple[float, int]] = []
        done = threading.Event()
        threading.Thread(target=watch, args=(server, looks, done.is_set), daemon=True).start()
        threading.Thread(target=answer, args=(looks,), daemon=True).start()
        membership.mark(READY)
        membership.wait_for(membership.cast.trainer_names, DONE, timeout=None)
        done.set()


def watch(server: TargetModelServer, looks: list[tuple[float, int]], done: Callable[[], bool]) -> None:
    while not done():
        # A GPU has the next request begun before it is done with one.
        looks.append((time.monotonic(), min(1, server.status()["running"])))
        time.sleep(_LOOK_SECONDS)


def answer(looks: list[tuple[float, int]]) -> None:
    for line in sys.stdin:
        window = json.loads(line)
        seen = [running for moment, running in looks if window["started"] <= moment <= window["ended"]]
        say({"idle_share": 1 - sum(seen) / len(seen)})


if __name__ == "__main__":
    role = {"colocated": train_colocated, "target": serve, "trainer": train_remote}[sys.argv[1]]
    role(compose(sys.argv[2:]))
