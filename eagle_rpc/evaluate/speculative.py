"""Greedy decoding of one prompt: by the target alone, and with a proposer whose guesses the target verifies.

Rounds and counts are those of vLLM: a draft follows every target call that does not end the text, prefill
included, and all of its guesses are verified and counted, also beyond the end of the text.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from eagle_rpc.errors import ConfigError
from eagle_rpc.evaluate.greedy import GreedyTarget
from eagle_rpc.evaluate.proposer import DraftProposer


@dataclass(slots=True)
class DecodingCounts:
    """Drafts of k guesses each, and how many of the guesses were accepted."""

    accepted_per_position: list[int]  # [k], drafts whose guess at each position was accepted
    num_drafts: int = 0
    num_drafted: int = 0  # guesses of all drafts
    num_tokens: int = 0  # of the text

    def add_draft(self, num_accepted: int) -> None:
        """Counts one verified draft of k guesses."""
        self.num_drafts += 1
        self.num_drafted += len(self.accepted_per_position)
        for position in range(num_accepted):
            self.accepted_per_position[position] += 1

    def add(self, other: "DecodingCounts") -> None:
        self.num_drafts += other.num_drafts
        self.num_drafted += other.num_drafted
        self.num_tokens += other.num_tokens
        pairs = zip(self.accepted_per_position, other.accepted_per_position, strict=True)
        self.accepted_per_position = [mine + theirs for mine, theirs in pairs]

    @property
    def accept_length(self) -> float:
        """Tokens per verifying target call, the target's own token included; 1.0 without drafts."""
        return 1.0 + sum(self.accepted_per_position) / max(1, self.num_drafts)

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of all drafts whose guess at each position was accepted."""
        return [accepted / max(1, self.num_drafts) for accepted in self.accepted_per_position]

    @property
    def conditional_acceptance_per_position(self) -> list[float]:
        """The same share of those drafts whose earlier guesses were all accepted."""
        pairs = itertools.pairwise([self.num_drafts, *self.accepted_per_position])
        return [accepted / max(1, reached) for reached, accepted in pairs]


@torch.inference_mode()
def decode_greedily(
    target: GreedyTarget, prompt_ids: Sequence[int], *, max_new_tokens: int, stop_token_ids: Collection[int]
) -> tuple[list[int], list[float]]:
    """Continues the prompt by at most `max_new_tokens` (> 0), up to and including a stop token.

    Returns the token ids and their margins, the distances between the two best logits. Raises `ConfigError`
    if prompt and text do not fit the target's context.
    """
    check_fits(target, prompt_ids, max_new_tokens)
    target.start()
    step = target.read(prompt_ids, predictions=1)
    token_ids, margins = step.choices, [step.margin]
    while len(token_ids) < max_new_tokens and token_ids[-1] not in stop_token_ids:
        step = target.read(token_ids[-1:], predictions=1)
        token_ids += step.choices
        margins.append(step.margin)
    return token_ids, margins


@torch.inference_mode()
def decode_speculatively(
    target: GreedyTarget,
    proposer: DraftProposer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
) -> tuple[list[int], DecodingCounts]:
    """The token ids of `decode_greedily`, several a target call, and the counts of the guesses.

    Raises `ConfigError` if prompt, text and the guesses beyond its end do not fit the target's context.
    """
    check_fits(target, prompt_ids, max_new_tokens + proposer.num_draft_tokens)
    target.start()
    proposer.start()
    counts = DecodingCounts([0] * proposer.num_draft_tokens)
    step = target.read(prompt_ids, predictions=1)
    token_ids, aux_N3H = step.choices, step.aux_N3H
    successors = [*prompt_ids[1:], *token_ids]
    while (length := _text_length(token_ids, max_new_tokens, stop_token_ids)) is None:
        guesses = proposer.propose(successors, aux_N3H)
        step = target.read([token_ids[-1], *guesses], predictions=len(guesses) + 1)
        choices = step.choices
        num_accepted = next((i for i, guess in enumerate(guesses) if guess != choices[i]), len(guesses))
        counts.add_draft(num_accepted)
        target.keep(len(prompt_ids) + len(token_ids) + num_accepted)
        successors, aux_N3H = choices[: num_accepted + 1], step.aux_N3H[: num_accepted + 1]
        token_ids += successors
    counts.num_tokens = length
    return token_ids[:length], counts


def _text_length(
    token_ids: Sequence[int], max_new_tokens: int, stop_token_ids: Collection[int]
) -> int | None:
    """Tokens of the text, stop token included; null if it is not finished."""
    for length, token_id in enumerate(token_ids[:max_new_tokens], start=1):
        if token_id in stop_token_ids or length == max_new_tokens:
            return length
    return None


def check_fits(target: GreedyTarget, prompt_ids: Sequence[int], more: int) -> None:
    """Raises `ConfigError` for an empty prompt, or if it and `more` tokens exceed the target's context."""
    if not prompt_ids:
        raise ConfigError("a prompt must hold at least one token, got none")
    if len(prompt_ids) + more > target.max_length:
        rule = (
            f"prompt and new tokens (guesses included) must fit the target's context of {target.max_length}"
        )
        raise ConfigError(f"{rule} tokens, got {len(prompt_ids)} + {more}")
