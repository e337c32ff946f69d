"""The draft: its configuration, model, attention and losses, and the training-time test that unrolls it."""

from eagle_rpc.draft.attention_memory import DraftCache, UnrollMemory
from eagle_rpc.draft.chains import Chains, DrawnGuesses, TargetText, guess_chains, replay
from eagle_rpc.draft.counts import DecodingCounts
from eagle_rpc.draft.losses import LOSSES
from eagle_rpc.draft.model import Eagle3Draft
from eagle_rpc.draft.trees import TextTrees, Trees, TreeShape, grow_trees, guess_trees
from eagle_rpc.draft.ttt import (
    Objective,
    ReferenceStep,
    TTTResult,
    count_rows,
    simulated_accept_length,
    step_weights,
    ttt_loss,
)
from eagle_rpc.sizes.draft import Eagle3DraftConfig

__all__ = [
    "LOSSES",
    "Chains",
    "DecodingCounts",
    "DraftCache",
    "DrawnGuesses",
    "Eagle3Draft",
    "Eagle3DraftConfig",
    "Objective",
    "ReferenceStep",
    "TTTResult",
    "TargetText",
    "TextTrees",
    "TreeShape",
    "Trees",
    "UnrollMemory",
    "count_rows",
    "grow_trees",
    "guess_chains",
    "guess_trees",
    "replay",
    "simulated_accept_length",
    "step_weights",
    "ttt_loss",
]
