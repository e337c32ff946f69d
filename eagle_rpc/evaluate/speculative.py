"""Greedy decoding of one prompt: by the target alone, and with a proposer whose guesses the target verifies.

Rounds and counts are those of vLLM (`DecodingCounts`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from eagle_rpc.draft import DecodingCounts
from eagle_rpc.errors import ConfigError
from eagle_rpc.evaluate.greedy import GreedyTarget
from eagle_rpc.evaluate.proposer import DraftProposer


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """A text, decoded with guesses."""

    token_ids: list[int]  # of the text, its stop token included
    accepted: list[int]  # guesses of each draft
    margins: list[list[float]]  # of the target's k + 1 choices after each draft
    counts: DecodingCounts


@torch.inference_mode()
def decode_greedily(
    target: GreedyTarget, prompt_ids: Sequence[int], *, max_new_tokens: int, stop_token_ids: Collection[int]
) -> tuple[list[int], list[float]]:
    """Continues the prompt by at most `max_new_tokens` (> 0), up to and including a stop token.

    Returns the token ids and their margins, the distances between the two best logits. Raises `ConfigError`
    if prompt and text do not fit the target's context.
    """
    check_fits(target.max_length, prompt_ids, max_new_tokens)
    target.start()
    step = target.read(prompt_ids, predictions=1)
    token_ids, margins = step.choices, step.margins
    while len(token_ids) < max_new_tokens and token_ids[-1] not in stop_token_ids:
        step = target.read(token_ids[-1:], predictions=1)
        token_ids += step.choices
        margins += step.margins
    return token_ids, margins


@torch.inference_mode()
def decode_speculatively(
    target: GreedyTarget,
    proposer: DraftProposer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
) -> Decoding:
    """The token ids of `decode_greedily`, several a target call.

    Raises `ConfigError` if prompt, text and the guesses beyond its end do not fit the target's context.
    """
    check_fits(target.max_length, prompt_ids, max_new_tokens + proposer.num_draft_tokens)
    target.start()
    proposer.start()
    accepted, margins = list[int](), list[list[float]]()
    step = target.read(prompt_ids, predictions=1)
    token_ids, aux_NW = step.choices, step.aux_NW
    successors = [*prompt_ids[1:], *token_ids]
    while (length := _text_length(token_ids, max_new_tokens, stop_token_ids)) is None:
        guesses = proposer.propose(successors, aux_NW)
        step = target.read([token_ids[-1], *guesses], predictions=len(guesses) + 1)
        choices = step.choices
        num_accepted = next((i for i, guess in enumerate(guesses) if guess != choices[i]), len(guesses))
        accepted.append(num_accepted)
        margins.append(step.margins)
        target.keep(len(prompt_ids) + len(token_ids) + num_accepted)
        successors, aux_NW = choices[: num_accepted + 1], step.aux_NW[: num_accepted + 1]
        token_ids += successors
    return Decoding(
        token_ids=token_ids[:length],
        accepted=accepted,
        margins=margins,
        counts=DecodingCounts.of_text(accepted, proposer.num_draft_tokens, length),
    )


def _text_length(
    token_ids: Sequence[int], max_new_tokens: int, stop_token_ids: Collection[int]
) -> int | None:
    """Tokens of the text, stop token included; null if it is not finished."""
    for length, token_id in enumerate(token_ids[:max_new_tokens], start=1):
        if token_id in stop_token_ids or length == max_new_tokens:
            return length
    return None


def check_fits(context: int, prompt_ids: Sequence[int], more: int) -> None:
    """Raises `ConfigError` for an empty prompt, or if it and `more` tokens exceed the target's `context`."""
    if not prompt_ids:
        raise ConfigError("a prompt must hold at least one token, got none")
    if len(prompt_ids) + more > context:
        rule = f"prompt and new tokens (guesses included) must fit the target's context of {context}"
        raise ConfigError(f"{rule} tokens, got {len(prompt_ids)} + {more}")
