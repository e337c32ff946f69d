"""Drafts of a kind: those of a category of prompts, or at a range of context lengths."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eagle_rpc.draft import Chains, TargetText, TextTrees, replay
from eagle_rpc.evaluate.intervals import Interval, bootstrap_interval

# The first range of context lengths ends here; each further one is twice as long.
_SHORTEST_CONTEXT = 128


@dataclass(frozen=True, slots=True)
class Draft:
    """One draft of decoding."""

    context: int  # tokens that are known when it begins
    accepted: int  # of its guesses


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftSlice:
    """The figures of some drafts."""

    num_prompts: int  # with such drafts
    num_drafts: int
    accept_length: float
    accept_length_interval: Interval


def drafts_of(text: TargetText, guesses: Chains | TextTrees, longest: int) -> list[Draft]:
    """The drafts that decoding of a text makes, each of at most `longest` accepted guesses."""
    drafts, known = list[Draft](), len(text.prompt_ids) + 1
    for accepted in replay(guesses.num_right, longest):
        drafts.append(Draft(known, accepted))
        known += accepted + 1
    return drafts


def by_category(drafts: Sequence[Sequence[Draft]], categories: Sequence[str]) -> dict[str, DraftSlice]:
    """The drafts of each prompt, by its category in alphabetical order."""
    groups = defaultdict[str, list[Sequence[Draft]]](list)
    for of_prompt, category in zip(drafts, categories, strict=True):
        groups[category].append(of_prompt)
    return {category: slice_of(groups[category]) for category in sorted(groups)}


def by_context(drafts: Sequence[Sequence[Draft]]) -> dict[int, DraftSlice]:
    """By the longest context of a range, which begins after that of the range before."""
    groups = defaultdict[int, list[list[Draft]]](lambda: [[] for _ in drafts])
    for prompt, of_prompt in enumerate(drafts):
        for draft in of_prompt:
            longest = max(_SHORTEST_CONTEXT, 1 << (draft.context - 1).bit_length())
            groups[longest][prompt].append(draft)
    return {longest: slice_of(groups[longest]) for longest in sorted(groups)}


def slice_of(drafts: Iterable[Sequence[Draft]]) -> DraftSlice:
    """The figures of drafts, given by prompt."""
    present = [of_prompt for of_prompt in drafts if of_prompt]
    tokens, calls = tokens_and_calls(present)
    return DraftSlice(
        num_prompts=len(present),
        num_drafts=sum(calls),
        accept_length=sum(tokens) / sum(calls) if calls else 1.0,
        accept_length_interval=bootstrap_interval(tokens, calls),
    )


def tokens_and_calls(drafts: Iterable[Sequence[Draft]]) -> tuple[list[int], list[int]]:
    """Of each prompt: tokens that target calls after drafts give, and the number of these calls."""
    by_prompt = list(drafts)
    tokens = [sum(draft.accepted + 1 for draft in of_prompt) for of_prompt in by_prompt]
    return tokens, [len(of_prompt) for of_prompt in by_prompt]
