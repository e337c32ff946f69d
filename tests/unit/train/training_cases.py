"""A draft small enough to train in a blink, and stand-ins for its data and its target."""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from eagle_rpc.config.choices import Resume
from eagle_rpc.config.schema import Config, DraftConfig, TrainConfig
from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.supervision import (
    Eagle3TargetBatch,
    ModelInfo,
    RequestTotals,
    StoredLogits,
    TokenBatch,
    VocabMapping,
    shifted_loss_mask,
)
from eagle_rpc.train.distributed import TrainerGroup
from eagle_rpc.train.loop import Trainer
from eagle_rpc.train.record import RunRecord, plain

torch.set_num_threads(1)  # bits depend on the number of threads, and so few numbers are quicker with one

VOCAB, DRAFT_VOCAB, HIDDEN = 40, 24, 16
OBJECTIVE = DraftConfig(vocab_size=DRAFT_VOCAB, ttt_steps=3)
DRAFT_CONFIG = Eagle3DraftConfig(
    hidden_size=HIDDEN,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=VOCAB,
    draft_vocab_size=DRAFT_VOCAB,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=128,
)
TARGET_INFO = ModelInfo(
    architecture="Stand-in",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_layers=8,
    aux_layer_ids=(1, 3, 4),
    dtype="float32",
    max_length=128,
    max_batch_tokens=4096,
    tokenizer_fingerprint="tokenizer",
    weights_fingerprint="weights",
    incarnation="first",
)


def train_config(**changes) -> TrainConfig:
    settings = TrainConfig(
        max_steps=8,
        batch_size=2,
        learning_rate=1e-2,
        warmup_share=0.25,
        checkpoint_every=3,
        validate_every=4,
        validation_batches=3,
        log_every=2,
        keep_checkpoints=2,
        resume=Resume.auto,
        device="cpu",
    )
    return replace(settings, **changes)


def random_draft(seed: int = 0) -> Eagle3Draft:
    embedding = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))
    draft = Eagle3Draft(DRAFT_CONFIG, embedding)
    draft.initialise(seed)
    return draft


@dataclass(frozen=True)
class RandomPlan:
    """Micro-batches as a function of their number; trainer r of R takes every R-th."""

    rank: int = 0
    size: int = 1
    seed: int = 0
    batch_size: int = 2
    batches_per_epoch: int = 5

    @property
    def sequences_per_batch(self) -> int:
        return self.size * self.batch_size

    @property
    def sequences_per_epoch(self) -> int:
        return self.batches_per_epoch * self.sequences_per_batch

    def batch(self, index: int) -> TokenBatch:
        generator = torch.Generator().manual_seed(1000 * self.seed + index * self.size + self.rank)
        shape = (self.batch_size, 12)
        lengths = torch.randint(6, 13, (self.batch_size, 1), generator=generator)
        attention_mask = (torch.arange(12) < lengths).long()
        loss_mask = attention_mask * (torch.arange(12) >= 3)
        return TokenBatch(
            input_ids=torch.randint(0, VOCAB, shape, generator=generator),
            attention_mask=attention_mask,
            loss_mask=loss_mask,
        )

    def batches(self, position: int) -> Iterator[TokenBatch]:
        return (self.batch(index) for index in itertools.count(position // self.sequences_per_batch))


class RepeatedPlan(RandomPlan):
    """The first micro-batch for ever."""

    def batch(self, index: int) -> TokenBatch:
        return RandomPlan.batch(self, 0)


class TableTarget:
    """A target whose outputs are looked up by token; prefetches like the remote one and notes what it was asked for."""

    prefetch = 3

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self._aux = torch.randn(VOCAB, 3 * HIDDEN, generator=generator)
        self._logits = 4 * torch.randn(VOCAB, VOCAB, generator=generator)
        self.totals = RequestTotals()
        self.batches_delivered = 0
        self.open_streams = 0

    def supervise(self, tokens: TokenBatch) -> Eagle3TargetBatch:
        logits = self._logits[tokens.input_ids].flatten(0, 1)
        rows = shifted_loss_mask(tokens).flatten().nonzero().squeeze(1)
        logits_NV = logits[rows + 1]
        argmax = logits_NV.argmax(dim=-1)
        keep = argmax < DRAFT_VOCAB
        return Eagle3TargetBatch(
            tokens=tokens,
            aux_hidden_states=self._aux[tokens.input_ids] * tokens.attention_mask.unsqueeze(-1),
            supervised_rows=rows[keep],
            targets=StoredLogits(logits_NV[keep][:, :DRAFT_VOCAB]),
            log_normalizer=logits_NV[keep].logsumexp(dim=-1),
            argmax=argmax[keep],
        )

    def stream(self, batches: Iterable[TokenBatch]) -> Iterator[Eagle3TargetBatch]:
        self.open_streams += 1
        source, ahead = iter(batches), []
        try:
            while True:
                ahead += itertools.islice(source, self.prefetch - len(ahead))
                if not ahead:
                    return
                yield self.deliver(ahead.pop(0))
        finally:
            self.open_streams -= 1

    def deliver(self, tokens: TokenBatch) -> Eagle3TargetBatch:
        self.batches_delivered += 1
        return self.supervise(tokens)


def run_record(settings: TrainConfig, trainers: int = 1, **changes) -> RunRecord:
    config = Config(train=settings, draft=OBJECTIVE)
    config.topology.trainers = trainers
    fields = {
        "draft_config": DRAFT_CONFIG,
        "mapping": VocabMapping.from_token_ids(torch.arange(DRAFT_VOCAB), VOCAB),
        "target": TARGET_INFO,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "config": plain(config),
    }
    return RunRecord(**(fields | changes))


def make_trainer(
    path: Path,
    settings: TrainConfig,
    *,
    group: TrainerGroup | None = None,
    target: TableTarget | None = None,
    objective: DraftConfig = OBJECTIVE,
    **changes,
) -> Trainer:
    group = group or TrainerGroup()
    parts = {
        "draft": random_draft(),
        "backend": target or TableTarget(),
        "batches": RandomPlan(group.rank, group.size, batch_size=settings.batch_size),
        "validation": RandomPlan(seed=7),
        "num_draft_tokens": 3,
        "record": run_record(settings, group.size),
        "stop": threading.Event(),
    }
    return Trainer(settings, objective, group=group, run=RunDirectory(path), **(parts | changes))


class StoppingTarget(TableTarget):
    """Sets `stop` when it has delivered so many batches."""

    def __init__(self, at: int, stop: threading.Event) -> None:
        super().__init__()
        self._at, self._stop = at, stop

    def deliver(self, tokens: TokenBatch) -> Eagle3TargetBatch:
        if self.batches_delivered == self._at:
            self._stop.set()
        return super().deliver(tokens)


class Interrupted(Exception):
    pass


class InterruptedTarget(TableTarget):
    """Fails when it has delivered so many batches, those of validation included."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def deliver(self, tokens: TokenBatch) -> Eagle3TargetBatch:
        if self.batches_delivered == self._at:
            raise Interrupted
        return super().deliver(tokens)


def trained_with_a_break(make: Callable[..., Trainer], *, at: int) -> Trainer:
    """A run whose first trainer was interrupted; `make` makes its trainers, with the `target` if it is given one."""
    with pytest.raises(Interrupted):
        make(target=InterruptedTarget(at)).train()
    resumed = make()
    resumed.train()
    return resumed


def final_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, optimiser state and averages."""
    learner = trainer.learner
    averages = ((f"average/{name}", tensor) for name, tensor in learner.average())
    everything = (*learner.weights(), *learner.optimiser_state(), *averages)
    return {name: tensor.detach().clone() for name, tensor in everything}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


CLOCK_FIGURES = ("tokens_per_second", "wait_share")


def without_clock(lines: Iterable[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in CLOCK_FIGURES} for line in lines]
