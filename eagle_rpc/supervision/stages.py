"""A target whose layers run in several processes, its stages: what they tell each other of a pass.

The first stage is the target that trainers know. It sends each request to all others, its hidden states to the
second one, which hands its own on to the third. Every stage answers the first one with what it adds to the reply:
the reply leaves from there, so no captured state crosses twice.

Legend: B batch, T sequence, H target hidden, R real tokens, N supervised rows, W width of a stage's captured states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from eagle_rpc.supervision.encodings import DraftHead
from eagle_rpc.supervision.fingerprint import WeightSamples
from eagle_rpc.supervision.output import TargetOutput
from eagle_rpc.supervision.session import ModelInfo
from eagle_rpc.supervision.tokens import TokenBatch


@dataclass(kw_only=True, slots=True)
class StageInfo:
    """What the first stage has to know of another one to answer `model_info` for the whole target."""

    number: int
    count: int  # of stages
    captured: tuple[int, ...]  # places in `aux_layer_ids` of the layers that this stage captures
    attention: str  # the part of the form of a pass that all stages share
    fused_rows: bool
    num_fused_mlps: int
    weights: WeightSamples


@dataclass(kw_only=True, slots=True)
class StagePass:
    """A request, as the stages behind the first one get it."""

    chain: str  # random id that the first stage gave this connection of all stages
    number: int  # unique in the chain
    tokens: TokenBatch
    encoding: str
    rows: str  # one of `ROW_RULES`
    selected_token_ids: Tensor | None  # [K] int64, for the last stage
    seconds_left: float  # until the first stage gives up


@dataclass(kw_only=True, slots=True)
class StageShare:
    """What a stage adds to the reply to one request; the last four are of the last stage."""

    aux: Tensor | None = None  # [R, W] of its captured layers side by side; null: it captures none
    supervised_rows: Tensor | None = None  # these as in `EncodedSupervision`
    values: Tensor | None = None
    log_normalizer: Tensor | None = None
    argmax: Tensor | None = None


@dataclass(kw_only=True, slots=True)
class StageBeat:
    """A stage's answer to a heartbeat of the first one."""

    incarnation: str
    chain: str  # that it belongs to
    draining: bool


@dataclass(kw_only=True, slots=True)
class StageOutput:
    """What one stage makes of a batch."""

    aux_hidden_states: Tensor  # [B, T, W]; W may be 0
    handed_on: list[Tensor]  # hidden states for the next stage, one for each piece of the batch
    output: TargetOutput | None  # of the last stage: with the model's last hidden states and head


class StageTarget(Protocol):
    """A part of a target: some decoder layers, in the first stage the embedding, in the last the head."""

    @property
    def devices(self) -> Sequence[torch.device]:
        """In the order in which a pass visits them."""

    def model_info(self) -> ModelInfo:
        """Identity of the whole target as far as this part knows it: without a fingerprint of the weights."""

    def stage_info(self) -> StageInfo:
        """What this part is."""

    def run_stage(self, tokens: TokenBatch, incoming: Sequence[Tensor] | None) -> StageOutput:
        """Runs the own layers on checked tokens and the hidden states of the stage before; the first has none."""

    def draft_head(self, selected_token_ids: Tensor) -> DraftHead:
        """As `Eagle3Target.draft_head`; of the last stage."""

    def probe_head(self, selected_token_ids: Tensor) -> None:
        """As `Eagle3Target.probe_head`; of the last stage."""


class FirstStageTarget(StageTarget, Protocol):
    """The part that has the embedding."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding [V, H]."""
