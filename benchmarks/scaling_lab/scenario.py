"""A service to measure: its size, its durations, and the shape of its requests."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import TokenBatch, VocabMapping

VOCAB_SIZE, DRAFT_VOCAB_SIZE = 96, 40
_SPREAD = 0.2  # of a pass, either way: chats differ in length


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Times in seconds. `load`: what the trainers could use over what the targets can give."""

    targets: int
    trainers: int
    forward: float  # mean of a pass
    load: float
    prefetch: int
    neighbours: int  # targets to which a trainer connects
    tokens: int  # of a request
    hidden_size: int
    failures: float  # of the whole service, a second
    outage: float  # of a target that was killed
    heartbeat_interval: float
    seconds: float  # that are measured

    @property
    def train(self) -> float:
        """Seconds of one trainer's work on a batch."""
        return self.trainers * self.forward / (self.targets * self.load)

    @property
    def reply_bytes(self) -> int:
        """Three captured layers and the draft vocabulary's logits of every token, in float32."""
        return 4 * self.tokens * (3 * self.hidden_size + DRAFT_VOCAB_SIZE)


class StandInTarget:
    """A target whose pass is a sleep: it occupies the forward thread and no processor."""

    takes_host_tokens = True

    def __init__(self, scenario: Scenario, index: int) -> None:
        self._scenario, self._draw = scenario, random.Random(index)
        shape = (1, scenario.tokens)
        self._output = SimpleNamespace(
            aux_hidden_states=torch.zeros(*shape, 3 * scenario.hidden_size),
            logits=torch.zeros(*shape, VOCAB_SIZE),
        )
        self._embedding = nn.Embedding(VOCAB_SIZE, scenario.hidden_size)
        nn.init.zeros_(self._embedding.weight)
        self.seconds_computed = 0.0
        self.seconds_starved = 0.0  # without a request that waits, from the end of a pass to the next one
        self.num_queued: Callable[[], int] = lambda: 0
        self._starves_since: float | None = None

    def generate_batch(self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Any:
        if self._starves_since is not None:
            self.seconds_starved += time.monotonic() - self._starves_since
        seconds = self._scenario.forward * self._draw.uniform(1 - _SPREAD, 1 + _SPREAD)
        time.sleep(seconds)
        self.seconds_computed += seconds
        self._starves_since = None if self.num_queued() else time.monotonic()
        return self._output

    def get_input_embeddings(self) -> nn.Embedding:
        return self._embedding


def target_config(scenario: Scenario) -> TargetConfig:
    """Room for every trainer's session and requests."""
    return TargetConfig(
        model="stand-in",
        max_sessions=2 * scenario.trainers + 1,
        max_queued_requests=scenario.trainers * scenario.prefetch + 1,
        session_lease=20 * scenario.heartbeat_interval,
    )


def tokens_of(scenario: Scenario) -> TokenBatch:
    ones = torch.ones(1, scenario.tokens, dtype=torch.int64)
    return TokenBatch(input_ids=ones, attention_mask=ones, loss_mask=ones)


def mapping() -> VocabMapping:
    return VocabMapping.from_token_ids(torch.arange(DRAFT_VOCAB_SIZE), VOCAB_SIZE)
