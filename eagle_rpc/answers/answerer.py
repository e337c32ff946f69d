"""What answers prompts: an engine in this process, or others elsewhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Answer:
    """The target's answer to one prompt."""

    key: str
    token_ids: list[int]  # without the stop token
    truncated: bool  # it reached the limit without a stop token
    stop_token: int | None = None  # the token that ended it, unless it is truncated
    refusal: str | None = None  # why there is no answer, in words; there are no tokens then
    after_end: tuple[int, ...] = ()  # what the target would go on to say, if that was asked for

    @classmethod
    def of_said(cls, key: str, said_ids: Sequence[int], *, truncated: bool) -> "Answer":
        """From all tokens that the target said."""
        if truncated:
            return cls(key, list(said_ids), truncated)
        return cls(key, list(said_ids[:-1]), truncated, said_ids[-1])

    @property
    def said_ids(self) -> list[int]:
        """All tokens that the target said."""
        return self.token_ids if self.stop_token is None else [*self.token_ids, self.stop_token]


def answers_under_way(num_generated: int, finished: int, finished_tokens: int, longest: int) -> float:
    """What is done of the answers that are not finished, in answers; all arguments but the first two are tokens.

    Short answers finish first, so their mean length is no estimate. All tokens over the finished answers is one, the
    maximum-likelihood estimate of a mean from observations of which some are cut off (Epstein and Sobel 1953), until
    the limit `longest` is smaller.
    """
    unfinished = num_generated - finished_tokens
    return unfinished / min(longest, num_generated / finished) if unfinished > 0 and finished else 0.0


class Answerer(Protocol):
    """Answers submitted prompts while a caller iterates over `answers()`."""

    num_generated: int
    """Tokens of all answers so far, stop tokens included."""

    @property
    def fingerprint(self) -> str:
        """Hash of the target's weights."""

    @property
    def context(self) -> int | None:
        """Tokens of a prompt and its answer at most; null: no limit is known."""

    def submit(self, key: str, prompt: Sequence[int]) -> None:
        """Queues a prompt, also while `answers()` runs. Sampling depends on `key` and the seed alone."""

    def answers(self) -> Iterator[Answer]:
        """Yields answers in the order in which they finish, until no prompt is left."""
