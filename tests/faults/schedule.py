"""Which fault hits whom at which step: everything follows from the seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from faults.kinds import Kind

# Of the steps: none before the run is under way, none when it ends.
_FIRST, _LAST = 0.03, 0.97


@dataclass(frozen=True)
class Fault:
    """One entry of the schedule."""

    step: int  # of the trainer, when it hits
    kind: Kind
    victim: str
    seed: int  # of what the fault draws itself


def make_schedule(kinds: Sequence[Kind], *, count: int, steps: int, seed: int) -> list[Fault]:
    """`count` faults, every kind at least once, in proportion to their shares; `count` must be at least the number of kinds."""
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
    """The largest remainders get what rounding leaves."""
    total = sum(kind.share for kind in kinds)
    exact = [count * kind.share / total for kind in kinds]
    numbers = [int(value) for value in exact]
    by_remainder = sorted(range(len(kinds)), key=lambda index: numbers[index] - exact[index])
    for index in by_remainder[: count - sum(numbers)]:
        numbers[index] += 1
    return [kind for kind, number in zip(kinds, numbers, strict=True) for _ in range(number)]
