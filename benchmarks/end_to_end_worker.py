"""Target and trainer of `end_to_end.py`: in one process, or in two over RPC. They answer questions in lines
of JSON.

python -m end_to_end_worker colocated|target|trainer HYDRA_OVERRIDE...
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
from workers import compose, connected, joined

from eagle_rpc.config import Config
from eagle_rpc.jobs.assembly import make_draft
from eagle_rpc.jobs.serve import load_server
from eagle_rpc.jobs.train import DONE, READY
from eagle_rpc.process.startup import start_worker
from eagle_rpc.service.lifecycle import TargetLifecycle
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import Eagle3TargetBackend, SessionSettings, TokenBatch, VocabMapping
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.model_files import load_target_config
from eagle_rpc.topology import resolve_device
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.learner import Learner

# The loss mask's share of the tokens.
_SUPERVISED_SHARE = 0.9
# Different batches, which are repeated.
_NUM_BATCHES = 8
# Seconds between two looks at the forward thread.
_LOOK_SECONDS = 0.002


def token_batches(config: Config, vocab_size: int) -> Iterator[TokenBatch]:
    """Random tokens [B, T], all of them real."""
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (config.train.batch_size, config.data.max_length)
    ids = [torch.randint(vocab_size, shape, generator=generator) for _ in range(_NUM_BATCHES)]
    masks = [(torch.rand(shape, generator=generator) < _SUPERVISED_SHARE).long() for _ in range(_NUM_BATCHES)]
    for one, mask in itertools.cycle(list(zip(ids, masks, strict=True))):
        yield TokenBatch(input_ids=one, attention_mask=torch.ones_like(one), loss_mask=mask)


def train(config: Config, backend: Eagle3TargetBackend, device: torch.device) -> None:
    """For each question, trains the number of optimiser steps that it names and answers with times in seconds."""
    target_config = load_target_config(config.target, cache_dir=config.run.cache_dir)
    vocab_size, generator = target_config.vocab_size, torch.Generator().manual_seed(1)
    selected = torch.randperm(vocab_size, generator=generator)[: config.draft.vocab_size].sort().values
    backend.open_session(VocabMapping.from_token_ids(selected, vocab_size))
    draft = make_draft(config, target_config, backend, device)
    learner = Learner(draft, config.train, config.draft, TrainerGroup(), total_steps=config.train.max_steps)
    with contextlib.closing(backend.stream(token_batches(config, vocab_size))) as stream:

        def steps(count: int) -> None:
            for _ in range(count):
                learner.learn(itertools.islice(stream, config.train.accumulation))
            synchronise(device)

        say(ready=True)
        for question in questions():
            # After warm-up as many requests are under way as during training.
            steps(question["warmups"])
            started, waited = time.monotonic(), backend.totals.seconds_waited
            steps(question["steps"])
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
    train(config, ColocatedEagle3TargetModel(target, config.target, settings), device)


def train_remote(config: Config) -> None:
    with joined(config) as (membership, device), connected(config, membership, device) as backend:
        train(config, backend, device)


def serve(config: Config) -> None:
    """For each question, a span of time, answers with the share of it in which the forward thread had no work."""
    with joined(config) as (membership, device), contextlib.ExitStack() as stack:
        server = load_server(config, [device])
        life = TargetLifecycle(server=server, config=config.rpc, stop=threading.Event())
        stack.enter_context(life.hosted())
        looks: list[tuple[float, int]] = []
        done = threading.Event()
        threading.Thread(target=watch, args=(server, looks, done.is_set), daemon=True).start()
        threading.Thread(target=answer, args=(looks,), daemon=True).start()
        membership.mark(READY)
        membership.wait_for(membership.cast.trainer_names, DONE, timeout=math.inf)
        done.set()


def watch(server: TargetModelServer, looks: list[tuple[float, int]], done: Callable[[], bool]) -> None:
    while not done():
        # A GPU begins the next request before it has finished one.
        looks.append((time.monotonic(), min(1, server.status()["running"])))
        time.sleep(_LOOK_SECONDS)


def answer(looks: list[tuple[float, int]]) -> None:
    for span in questions():
        seen = [running for moment, running in looks if span["started"] <= moment <= span["ended"]]
        say(idle_share=1 - sum(seen) / len(seen))


if __name__ == "__main__":
    role = {"colocated": train_colocated, "target": serve, "trainer": train_remote}[sys.argv[1]]
    role(compose(sys.argv[2:]))
