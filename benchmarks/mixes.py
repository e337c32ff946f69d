"""Mixes of supervision as chats have them: which tokens of a row are answers. Imports torch only.

A row holds chats one after the other; the last one is cut at its end. Lengths in tokens are drawn log-normally
around their medians: questions and answers as in open chat sets, documents of some pages, tool calls of a line.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

Turns = Iterator[tuple[int, bool]]  # length in tokens, and whether they are supervised

# Spread of the logarithm of a length: two thirds lie between the median over 1.8 and 1.8 times it.
_SPREAD = 0.6


def _around(median: int, generator: Generator) -> int:
    return max(1, round(median * math.exp(_SPREAD * float(torch.randn((), generator=generator)))))


def _question(generator: Generator) -> Turns:
    """A short question, a long answer."""
    yield _around(60, generator), False
    yield _around(600, generator), True


def _document(generator: Generator) -> Turns:
    """A long document with a question about it, a short answer."""
    yield _around(1500, generator), False
    yield _around(120, generator), True


def _tools(generator: Generator) -> Turns:
    """Descriptions of tools and a question; two to five calls, each with a result; an answer."""
    yield _around(500, generator), False
    for _ in range(int(torch.randint(2, 6, (), generator=generator))):
        yield _around(50, generator), True
        yield _around(250, generator), False
    yield _around(200, generator), True


def _any(generator: Generator) -> Turns:
    """Half of the chats are questions, a quarter documents, a quarter tool dialogues."""
    kinds = (_question, _question, _document, _tools)
    yield from kinds[int(torch.randint(len(kinds), (), generator=generator))](generator)


MIXES: dict[str, Callable[[Generator], Turns]] = {
    "questions": _question,
    "documents": _document,
    "tools": _tools,
    "all": _any,
}


def mask_of_mix(name: str, batch: int, length: int, *, seed: int = 1) -> Tensor:
    """[B, T] bool, true at answers. A longer batch or row begins as a shorter one of the same seed does."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row in range(batch):
        generator = Generator().manual_seed(1000 * seed + row)
        place = 0
        while place < length:
            for size, is_answer in MIXES[name](generator):
                mask[row, place : place + size] = is_answer
                place += size
    return mask
