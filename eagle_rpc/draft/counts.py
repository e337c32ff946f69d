"""Drafts and accepted guesses of speculative decoding, counted as vLLM counts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class DecodingCounts:
    """Drafts of k guesses each, and how many of the guesses were accepted.

    A draft follows every target call that does not end a text, prefill included; all of its guesses are
    verified and counted, also beyond the end of the text.
    """

    accepted_per_position: list[int]  # [k], drafts whose guess at each position was accepted
    num_drafts: int = 0
    num_texts: int = 0
    num_tokens: int = 0  # of the texts, without guesses beyond their ends

    @classmethod
    def of_text(cls, accepted: Sequence[int], num_draft_tokens: int, num_tokens: int) -> "DecodingCounts":
        """One text of `num_tokens`; `accepted` guesses of each of its drafts."""
        per_position = [sum(count > position for count in accepted) for position in range(num_draft_tokens)]
        return cls(per_position, len(accepted), 1, num_tokens)

    def add(self, other: "DecodingCounts") -> None:
        self.num_drafts += other.num_drafts
        self.num_texts += other.num_texts
        self.num_tokens += other.num_tokens
        pairs = zip(self.accepted_per_position, other.accepted_per_position, strict=True)
        self.accepted_per_position = [mine + theirs for mine, theirs in pairs]

    def to_list(self) -> list[int]:
        """All counts as numbers that may be added over trainers; `from_list` reads them."""
        return [self.num_drafts, self.num_texts, self.num_tokens, *self.accepted_per_position]

    @classmethod
    def from_list(cls, numbers: Sequence[int]) -> "DecodingCounts":
        return cls(list(numbers[3:]), *numbers[:3])

    @property
    def num_drafted(self) -> int:
        """Guesses of all drafts."""
        return self.num_drafts * len(self.accepted_per_position)

    @property
    def accept_length(self) -> float:
        """Tokens per verifying target call, the target's own token included; 1.0 without drafts."""
        return 1.0 + sum(self.accepted_per_position) / max(1, self.num_drafts)

    @property
    def accept_length_within_text(self) -> float:
        """The same without tokens beyond the end of a text. The first token of a text is of its prefill."""
        return (self.num_tokens - self.num_texts) / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of all drafts whose guess at each position was accepted."""
        return [accepted / max(1, self.num_drafts) for accepted in self.accepted_per_position]

    @property
    def conditional_acceptance_per_position(self) -> list[float]:
        """The same share of those drafts whose earlier guesses were all accepted."""
        pairs = itertools.pairwise([self.num_drafts, *self.accepted_per_position])
        return [accepted / max(1, reached) for reached, accepted in pairs]
