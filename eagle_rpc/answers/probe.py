"""A look whether an answerer decodes a model: families differ in caches and in attention.

Legend: T tokens, V target vocab.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from eagle_rpc.answers.answerer import Answerer
from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.probes import FAILURES

# Prompts of unlike length, so that their rows differ, and tokens of their answers.
_LENGTHS, _NEW_TOKENS = (9, 3), 4
# A chosen token may have a logit this much below the best, in standard deviations of the logits.
_TIE = {torch.float32: 1e-3}
_ROUGH_TIE = 0.1


def probe_engine(model: PreTrainedModel) -> None:
    """`probe_answers` of the batched engine."""
    probe_answers(model, AnswerEngine, "the batched engine")


def probe_answers(model: PreTrainedModel, kind: Callable[..., Answerer], what: str) -> None:
    """Decodes two prompts greedily, and compares with the model without a cache.

    Raises `UnsupportedTarget` in one sentence if the answerer fails or chooses other tokens.
    """
    name = type(model).__name__
    last = TargetShape.of(model.config).vocab_size - 1
    ids = torch.linspace(0, last, max(_LENGTHS)).long().tolist()
    answerer = kind(model, batch_size=2, max_new_tokens=_NEW_TOKENS, stop_token_ids=[last])
    for length in _LENGTHS:
        answerer.submit(str(length), ids[:length])
    try:
        answers = {int(answer.key): answer for answer in answerer.answers()}
    except (UnsupportedTarget, torch.OutOfMemoryError):
        raise
    except FAILURES as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnsupportedTarget(f"{what} cannot decode {name}: {found}") from error
    for length, answer in answers.items():
        gap = _largest_gap(model, ids[:length], answer.said_ids)
        if not gap <= _TIE.get(model.dtype, _ROUGH_TIE):
            why = f"a token that it chose is {gap:.2g} standard deviations below the best"
            raise UnsupportedTarget(f"{what} does not decode {name} as the model does: {why}")


@torch.inference_mode()
def _largest_gap(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """How far the answer's tokens are below the best ones of a forward without a cache."""
    ids_1T = torch.tensor([[*prompt, *answer[:-1]]], device=model.device)
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, len(prompt) - 1 :].float()
    chosen_T = logits_TV.gather(1, torch.tensor(answer, device=model.device)[:, None]).squeeze(1)
    return float(((logits_TV.max(dim=1).values - chosen_T) / logits_TV.std(dim=1)).max())
