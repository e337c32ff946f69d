"""Real decoding of a prompt, the judge of what the target's own text says about its drafts."""

import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from eagle_rpc.draft import Chains, TargetText, TextTrees, replay
from eagle_rpc.evaluate.decoding.greedy import GreedyTarget
from eagle_rpc.evaluate.decoding.proposer import DraftProposer
from eagle_rpc.evaluate.decoding.speculative import Decoding, decode_greedily, decode_speculatively
from eagle_rpc.evaluate.decoding.trees import TreeProposer, TreeTarget, decode_with_trees

DECODED_TEXT, BATCHED_TEXT, GUESSES = "text with the draft", "text in batches", "guesses"
TREE_TEXT = "text with trees"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The first token at which two ways to decode a prompt differ."""

    of: str  # a text, from that of the target alone, or guesses, from those of the batched way
    token: int  # its index in the text
    margin: float  # between the two best logits there; for guesses of target or draft, the smaller one


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedPrompt:
    """One prompt, decoded by the target alone and with the draft."""

    tokens: int
    own_tokens: int  # of the text that the target decodes alone
    num_drafts: int
    accepted_per_position: list[int]
    differences: list[Difference]
    seconds: float
    seconds_without_draft: float


def decode_both(
    target: GreedyTarget,
    proposer: DraftProposer,
    text: TargetText,
    chains: Chains,
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
) -> DecodedPrompt:
    """Decodes the prompt of `text` by the target alone, then with the draft, and compares."""
    started = time.perf_counter()
    own_ids, margins = decode_greedily(
        target, text.prompt_ids, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids
    )
    between = time.perf_counter()
    decoding = decode_speculatively(
        target, proposer, text.prompt_ids, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids
    )
    finished = time.perf_counter()
    texts = {DECODED_TEXT: decoding.token_ids, BATCHED_TEXT: text.token_ids}
    places = {name: first_difference(own_ids, token_ids) for name, token_ids in texts.items()}
    differences = [
        Difference(of=name, token=place, margin=margins[place])
        for name, place in places.items()
        if place is not None
    ]
    if not differences:
        differences = _differing_guesses(decoding, chains, proposer.num_draft_tokens)
    return DecodedPrompt(
        tokens=len(decoding.token_ids),
        own_tokens=len(own_ids),
        num_drafts=decoding.counts.num_drafts,
        accepted_per_position=decoding.counts.accepted_per_position,
        differences=differences,
        seconds=finished - between,
        seconds_without_draft=between - started,
    )


def first_difference(ids: Sequence[int], other_ids: Sequence[int]) -> int | None:
    """The index of the first token that differs; null also where one text is the beginning of the other."""
    pairs = enumerate(zip(ids, other_ids, strict=False))
    return next((index for index, (mine, theirs) in pairs if mine != theirs), None)


def _differing_guesses(decoding: Decoding, chains: Chains, num_draft_tokens: int) -> list[Difference]:
    """The first guess of equal texts that real decoding accepts and `chains` do not, or the reverse."""
    found = _differing_draft(decoding, replay(chains.num_right, num_draft_tokens))
    if found is None:
        return []
    draft, known, guess = found
    margin = min(float(chains.margins_AS[known - 1, guess]), decoding.margins[draft][guess])
    return [Difference(of=GUESSES, token=known + guess, margin=margin)]


def _differing_draft(decoding: Decoding, replayed: Sequence[int]) -> tuple[int, int, int] | None:
    """The first draft of equal texts that accepts another number of guesses than `replayed`.

    Its index, the tokens known at its begin, and the first guess of which one way alone accepts.
    """
    known = 1
    for draft, (real, expected) in enumerate(zip(decoding.accepted, replayed, strict=False)):
        if real != expected:
            return draft, known, min(real, expected)
        known += real + 1
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedTrees:
    """One prompt, decoded with trees."""

    tokens: int
    num_drafts: int
    accepted_per_depth: list[int]
    differences: list[Difference]  # from the target's text in batches, and the guesses over it
    seconds: float


def decode_trees(
    target: TreeTarget,
    proposer: TreeProposer,
    text: TargetText,
    trees: TextTrees,
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
) -> DecodedTrees:
    """Decodes the prompt of `text` with trees, and compares."""
    started = time.perf_counter()
    decoding = decode_with_trees(
        target, proposer, text.prompt_ids, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids
    )
    seconds = time.perf_counter() - started
    margins = [decoding.first_margin, *itertools.chain(*decoding.margins)]
    differences, place = list[Difference](), first_difference(decoding.token_ids, text.token_ids)
    if place is not None:
        differences.append(Difference(of=TREE_TEXT, token=place, margin=margins[place]))
    elif found := _differing_draft(decoding, replay(trees.num_right, proposer.shape.depth)):
        _, known, guess = found
        margin = min(float(trees.margins_A[known - 1]), margins[known + guess])
        differences.append(Difference(of=GUESSES, token=known + guess, margin=margin))
    return DecodedTrees(
        tokens=len(decoding.token_ids),
        num_drafts=decoding.counts.num_drafts,
        accepted_per_depth=decoding.counts.accepted_per_position,
        differences=differences,
        seconds=seconds,
    )
