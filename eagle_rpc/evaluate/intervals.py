"""Confidence intervals over prompts.

Legend: R resamples, P prompts.
"""

from collections.abc import Sequence

import numpy as np

_RESAMPLES, _SEED = 2000, 0


def bootstrap_interval(tokens: Sequence[float], calls: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of `sum(tokens) / sum(calls)`; an entry of each is a prompt's.

    Prompts are drawn with replacement, always in the same way. Null if fewer than two prompts have calls.
    """
    tokens_P, calls_P = np.array(tokens, dtype=np.float64), np.array(calls, dtype=np.float64)
    tokens_P, calls_P = tokens_P[calls_P > 0], calls_P[calls_P > 0]
    num_prompts = len(calls_P)
    if num_prompts < 2:
        return None
    drawn_RP = np.random.default_rng(_SEED).multinomial(
        num_prompts, np.full(num_prompts, 1 / num_prompts), size=_RESAMPLES
    )
    low, high = np.percentile((drawn_RP @ tokens_P) / (drawn_RP @ calls_P), [2.5, 97.5])
    return float(low), float(high)
