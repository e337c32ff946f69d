"""The draft: its shape, its layer, its attention, and the loss that trains it."""

from eagle_rpc.draft.attention import AttentionMemory, DraftCache, UnrollMemory, ttt_attention
from eagle_rpc.draft.config import Eagle3DraftConfig
from eagle_rpc.draft.loss import soft_cross_entropy
from eagle_rpc.draft.losses import ACCEPTANCE_LOSSES, LOSSES
from eagle_rpc.draft.model import Eagle3Draft
from eagle_rpc.draft.ttt import (
    Objective,
    ReferenceStep,
    TTTResult,
    TTTStep,
    count_rows,
    simulated_accept_length,
    step_weights,
    ttt_loss,
)

__all__ = [
    "ACCEPTANCE_LOSSES",
    "LOSSES",
    "AttentionMemory",
    "DraftCache",
    "Eagle3Draft",
    "Eagle3DraftConfig",
    "Objective",
    "ReferenceStep",
    "TTTResult",
    "TTTStep",
    "UnrollMemory",
    "count_rows",
    "simulated_accept_length",
    "soft_cross_entropy",
    "step_weights",
    "ttt_attention",
    "ttt_loss",
]
