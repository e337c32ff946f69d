"""Greedy decoding of one prompt: by the target alone, and with a proposer whose guesses the target verifies.

Rounds and counts are those of vLLM (`DecodingCounts`).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_rpc.draft import DecodingCounts
from eagle_rpc.errors import ConfigError
from eagle_rpc.evaluate.decoding.greedy import GreedyTarget
from eagle_rpc.evaluate.decoding.proposer import DraftProposer


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """A text, decoded with guesses."""

    token_ids: list[int]  # of the text, its stop token included
    accepted: list[int]  # guesses of each draft
    first_margin: float  # of the first token, which is the prompt's
    margins: list[list[float]]  # of the target's choices after each draft, the first wrong one at least
    guess_margins: list[list[float]]  # of the guesses of each draft; none of trees
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


@dataclass(frozen=True, slots=True)
class Verified:
    """The outcome of a round that accepted A guesses."""

    choices: list[int]  # [A + 1], the accepted guesses and the target's own next token
    margins: list[float]  # at least of these choices
    guess_margins: list[float]  # of the guesses of a chain
    aux_NW: Tensor  # [A + 1, W], of the tokens before the choices


def decode_speculatively(
    target: GreedyTarget,
    proposer: DraftProposer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
) -> Decoding:
    """The token ids of `decode_greedily`, several a target call, with a chain of guesses for each.

    Raises `ConfigError` if prompt, text and the guesses beyond its end do not fit the target's context.
    """

    def verify(next_token_ids: Sequence[int], aux_NW: Tensor, length: int) -> Verified:
        proposal = proposer.propose(next_token_ids, aux_NW)
        guesses = proposal.token_ids
        step = target.read([next_token_ids[-1], *guesses], predictions=len(guesses) + 1)
        choices = step.choices
        num_accepted = next((i for i, guess in enumerate(guesses) if guess != choices[i]), len(guesses))
        target.keep(length + 1 + num_accepted)
        kept = slice(num_accepted + 1)
        return Verified(choices[kept], step.margins, proposal.margins, step.aux_NW[kept])

    proposer.start()
    limits = {"max_new_tokens": max_new_tokens, "longest": proposer.num_draft_tokens}
    return decode_in_rounds(target, verify, prompt_ids, **limits, stop_token_ids=stop_token_ids)


@torch.inference_mode()
def decode_in_rounds(
    target: GreedyTarget,
    verify: Callable[[Sequence[int], Tensor, int], Verified],
    prompt_ids: Sequence[int],
    *,
    longest: int,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
) -> Decoding:
    """The token ids of `decode_greedily`, in rounds of at most `longest` accepted guesses.

    `verify` gets the tokens that were added in the round before, each one place later (the target has not read the
    last of them), the captured states before them, and the number of tokens that the target has read. It guesses
    what follows, lets the target verify that in one call, and leaves the accepted guesses read. Raises as
    `decode_speculatively`.
    """
    check_fits(target.max_length, prompt_ids, max_new_tokens + longest)
    target.start()
    accepted, margins, guess_margins = list[int](), list[list[float]](), list[list[float]]()
    step = target.read(prompt_ids, predictions=1)
    token_ids, aux_NW, first_margin = step.choices, step.aux_NW, step.margins[0]
    successors = [*prompt_ids[1:], *token_ids]
    while (length := _text_length(token_ids, max_new_tokens, stop_token_ids)) is None:
        verified = verify(successors, aux_NW, len(prompt_ids) + len(token_ids) - 1)
        accepted.append(len(verified.choices) - 1)
        margins.append(verified.margins)
        guess_margins.append(verified.guess_margins)
        successors, aux_NW = verified.choices, verified.aux_NW
        token_ids += successors
    return Decoding(
        token_ids=token_ids[:length],
        accepted=accepted,
        first_margin=first_margin,
        margins=margins,
        guess_margins=guess_margins,
        counts=DecodingCounts.of_text(accepted, longest, length),
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
