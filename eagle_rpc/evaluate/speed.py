"""The speed of decoding at a batch size, estimated from times of the calls and from the accept length."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CallTimes:
    """Seconds of one call for a batch. All sequences of it have read the same number of tokens."""

    batch_size: int
    context: int  # tokens that each sequence has read
    target: dict[int, float]  # of the target for so many tokens a sequence, of 1 to k + 1
    draft_read: dict[
        int, float
    ]  # of the draft's first guess, which reads so many verified tokens, of 2 to k + 1
    draft_guess: float  # of each further guess


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSpeed:
    """Tokens a second of a batch in all, by the number of draft tokens."""

    times: CallTimes
    tokens_per_second_without_draft: float
    tokens_per_second: dict[int, float]
    speed_up: dict[int, float]
    best_draft_tokens: int  # 0 where every draft is slower than none


def estimate_speed(times: CallTimes, accept_lengths: Mapping[int, float]) -> BatchSpeed:
    """The speed with drafts of k guesses, for each k of `accept_lengths`.

    A round of k guesses is a target call for k + 1 tokens, the draft's reading of k + 1 verified tokens and k - 1
    further guesses; it gives `accept_lengths[k]` tokens a sequence. Without a draft a call gives one. What an engine
    does between the calls is not counted.
    """
    plain = times.batch_size / times.target[1]
    fast = {
        k: times.batch_size
        * length
        / (times.target[k + 1] + times.draft_read[k + 1] + (k - 1) * times.draft_guess)
        for k, length in accept_lengths.items()
    }
    speed_up = {k: speed / plain for k, speed in fast.items()}
    best = max(speed_up, key=speed_up.__getitem__)
    return BatchSpeed(
        times=times,
        tokens_per_second_without_draft=plain,
        tokens_per_second=fast,
        speed_up=speed_up,
        best_draft_tokens=best if speed_up[best] > 1 else 0,
    )
