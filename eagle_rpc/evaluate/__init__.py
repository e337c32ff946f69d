"""Speculative decoding for real, and what it measures."""

from eagle_rpc.evaluate.acceptance import Evaluation, evaluate_draft, stop_token_ids

__all__ = ["Evaluation", "evaluate_draft", "stop_token_ids"]
