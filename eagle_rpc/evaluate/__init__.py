"""Real speculative decoding, and the figures it gives."""

from eagle_rpc.evaluate.acceptance import Evaluation, evaluate_draft
from eagle_rpc.evaluate.prompts import read_prompts

__all__ = ["Evaluation", "evaluate_draft", "read_prompts"]
