"""Confidence intervals over prompts.

Legend: R resamples, P prompts.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float] | None
"""95 % bootstrap interval over prompts; null for a single prompt."""

_RESAMPLES, _SEED = 2000, 0


def bootstrap_interval(tokens: Sequence[float], calls: Sequence[float]) -> Interval:
    """The 95 % percentile bootstrap interval of `sum(tokens) / sum(calls)`; an entry of each is a prompt's.

    Prompts are drawn with replacement, always in the same way. Null if fewer than two prompts have calls.
    """
    tokens_P, calls_P = np.array(tokens, dtype=np.float64), np.array(calls, dtype=np.float64)
    tokens_P, calls_P = tokens_P[calls_P > 0], calls_P[calls_P > 0]
    if len(calls_P) < 2:
        return None
    drawn_RP = _resamples(len(calls_P))
    return _middle((drawn_RP @ tokens_P) / (drawn_RP @ calls_P))


def bootstrap_gain(
    one: tuple[Sequence[float], Sequence[float]], other: tuple[Sequence[float], Sequence[float]]
) -> Interval:
    """The interval of the ratio of `other` minus that of `one`, each tokens and calls of the same prompts.

    A resample draws the same prompts for both, so that what is hard for both does not count.
    """
    tokens_P, calls_P, more_tokens_P, more_calls_P = (
        np.array(column, dtype=np.float64) for column in (*one, *other)
    )
    if len(calls_P) < 2:
        return None
    drawn_RP = _resamples(len(calls_P))
    before, after = (
        (drawn_RP @ tokens) / np.maximum(drawn_RP @ calls, 1)
        for tokens, calls in ((tokens_P, calls_P), (more_tokens_P, more_calls_P))
    )
    return _middle(after - before)


def _resamples(num_prompts: int) -> NDArray[np.int64]:
    """How often each resample has each prompt, [R, P]."""
    generator = np.random.default_rng(_SEED)
    return generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=_RESAMPLES)


def _middle(values_R: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values_R, [2.5, 97.5])
    return float(low), float(high)
