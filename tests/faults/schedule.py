"""A seeded schedule: the fault, its victim and its step."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from faults.kinds import Kind

# Shares of the steps between which faults hit: not at the start of a run and not at its end.
_FIRST, _LAST = 0.03, 0.97


@dataclass(frozen=True)
class Fault:
    """One entry of the schedule."""

    step: int  # the trainer's, at which it hits
    kind: Kind
    victim: str
    seed: int  # of the random choices of the fault itself


def make_schedule(kinds: Sequence[Kind], *, count: int, steps: int, seed: int) -> list[Fault]:
    """`count` faults in proportion to the shares of their kinds. Raises `ValueError` if there are more kinds
    than faults.
    """
    if count < len(kinds):
        raise ValueError(f"--faults must be at least {len(kinds)}, one of each kind, got {count}")
    draw = random.Random(seed)
    chosen = list(kinds) + _in_proportion(kinds, count - len(kinds))
    draw.shuffle(chosen)
    pace = (_LAST - _FIRST) * steps / count
    return [
        Fault(
            step=int(_FIRST * steps + (number + draw.random()) * pace),
            kind=kind,
            victim=draw.choice(kind.victims),
            seed=draw.randrange(2**31),
        )
        for number, kind in enumerate(chosen)
    ]


def _in_proportion(kinds: Sequence[Kind], count: int) -> list[Kind]:
    """Rounded down; the rest goes to the kinds with the largest remainders."""
    total = sum(kind.share for kind in kinds)
    exact = [count * kind.share / total for kind in kinds]
    numbers = [int(value) for value in exact]
    by_remainder = sorted(range(len(kinds)), key=lambda index: numbers[index] - exact[index])
    for index in by_remainder[: count - sum(numbers)]:
        numbers[index] += 1
    return [kind for kind, number in zip(kinds, numbers, strict=True) for _ in range(number)]
