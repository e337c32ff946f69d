"""Drafts in speculative decoding: over the target's own texts, and for real."""

from eagle_rpc.evaluate.acceptance import evaluate_draft
from eagle_rpc.evaluate.prompts import read_prompts
from eagle_rpc.evaluate.result import Evaluation

__all__ = ["Evaluation", "evaluate_draft", "read_prompts"]
