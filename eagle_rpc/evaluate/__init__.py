"""Drafts in speculative decoding: over the target's own texts, and for real."""

from eagle_rpc.evaluate.acceptance import evaluate_draft
from eagle_rpc.evaluate.comparison import Comparison, compare_drafts
from eagle_rpc.evaluate.prompts import Prompt, read_prompts
from eagle_rpc.evaluate.result import Evaluation
from eagle_rpc.evaluate.served import OwnOutcome, ServedDraft, decode_here

__all__ = [
    "Comparison",
    "Evaluation",
    "OwnOutcome",
    "Prompt",
    "ServedDraft",
    "compare_drafts",
    "decode_here",
    "evaluate_draft",
    "read_prompts",
]
