"""This package's target service: static (target and trainer in one job) and elastic (jobs of their own).

python -m peers.ours target|trainer WORK.json HYDRA_OVERRIDE...
"""

import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from peers.work import Side, Work, answer_commands
from torch import Tensor
from workers import compose, connected, elastic_trainer, joined

from eagle_rpc.client import RemoteEagle3TargetModel
from eagle_rpc.config import Config
from eagle_rpc.config.choices import MembershipKind
from eagle_rpc.jobs.train import serve_until_done
from eagle_rpc.supervision import Eagle3TargetBatch, TokenBatch, VocabMapping

# Rows whose probabilities are read at a time, as the loss does.
_CHUNK_ROWS = 512


def overrides(work: Work) -> list[str]:
    """The settings of target and client, as `python -m eagle_rpc` takes them."""
    return [
        *(f"++target.random.{name}={value}" for name, value in work.architecture.items()),
        f"target.aux_layer_ids=[{','.join(map(str, work.aux_layer_ids))}]",
        f"target.dtype={work.dtype}",
        "target.device=cpu",
        "train.device=cpu",
        f"run.seed={work.seed}",
        f"run.dir={work.directory}/run",
        "run.threads=1",
        f"supervision.prefetch={work.prefetch}",
        f"draft.vocab_size={work.draft_vocab_size}",
    ]


def serve_target(_work: Work, config: Config) -> None:
    """The target of a static job."""
    with joined(config) as (membership, device):
        serve_until_done(config, [device], membership, threading.Event())


def use_target(work: Work, config: Config) -> None:
    """A trainer that only reads the supervision that it receives."""
    if config.rpc.membership is MembershipKind.elastic:
        with elastic_trainer(config) as (_, target):
            _answer(work, target)
    else:
        with joined(config) as (membership, device), connected(config, membership, device) as target:
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
    work = Work.load(sys.argv[2])
    role(work, compose([*overrides(work), *sys.argv[3:]]))
