"""Drafts in speculative decoding: over the target's own texts, and for real."""

from eagle_rpc.evaluate.acceptance import evaluate_draft
from eagle_rpc.evaluate.comparison import Comparison, compare_drafts
from eagle_rpc.evaluate.prompts import Prompt, read_prompts
from eagle_rpc.evaluate.result import Evaluation

__all__ = ["Comparison", "Evaluation", "Prompt", "compare_drafts", "evaluate_draft", "read_prompts"]
