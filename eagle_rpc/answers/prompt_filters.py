"""Which self-made prompts are kept: the reasons against a prompt, and a memory of the prompts before it."""

import hashlib
import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np

# A prompt in which more of the n-grams of tokens occur for the second time is a loop.
_NGRAM, _MOST_REPEATED = 4, 0.3
# Two prompts are near duplicates from this Jaccard similarity of their shingles of characters on.
_SHINGLE, _NEAR = 5, 0.7
# MinHash (Broder 1997) in bands: pairs of similarity 0.7 meet in a band with probability 0.985.
_BANDS, _BAND_ROWS = 10, 3
_REPLACEMENT = "\ufffd"


def fault_of(
    text: str,
    token_ids: Sequence[int],
    *,
    special_ids: Collection[int],
    marks: Collection[str],
    min_chars: int,
    scripts: Collection[str],
) -> str | None:
    """Why a prompt is left out, apart from other prompts; None if it is good.

    `marks` are texts of the template; `scripts` are the first words of the Unicode names of allowed letters.
    """
    if any(token in special_ids for token in token_ids) or any(mark in text for mark in marks):
        return "with marks of the template"
    if (
        any(not (character.isprintable() or character in "\n\t") for character in text)
        or _REPLACEMENT in text
    ):
        return "not printable"
    if len(text) < min_chars or not any(map(str.isalpha, text)):
        return "too short"
    if _repeated_share(token_ids) > _MOST_REPEATED:
        return "repetitive"
    if scripts and not {_script(letter) for letter in set(text) if letter.isalpha()} <= set(scripts):
        return "in another script"
    return None


def normalised(text: str) -> str:
    """Equal for texts that differ in case, spaces and punctuation only."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


class SeenPrompts:
    """All prompts so far, to find equal and nearly equal ones."""

    def __init__(self) -> None:
        self._texts: set[str] = set()
        self._shingles: list[set[int]] = []
        self._bands: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
        draws = np.random.default_rng(0).integers(1, 2**63, size=(2, _BANDS * _BAND_ROWS), dtype=np.uint64)
        self._factors, self._offsets = draws[0] | np.uint64(1), draws[1]

    def add(self, text: str) -> str | None:
        """Adds a prompt; or returns why it is left out, and does not add it."""
        text = normalised(text)
        if text in self._texts:
            return "duplicates"
        shingles = _shingles(text)
        bands = self._bands_of(shingles)
        candidates = set(itertools.chain.from_iterable(self._bands[band] for band in bands))
        if any(_similarity(shingles, self._shingles[index]) >= _NEAR for index in candidates):
            return "near duplicates"
        self._texts.add(text)
        for band in bands:
            self._bands[band].append(len(self._shingles))
        self._shingles.append(shingles)
        return None

    def _bands_of(self, shingles: set[int]) -> list[tuple[int, bytes]]:
        values = np.fromiter(shingles, dtype=np.uint64, count=len(shingles))[:, None]
        least = (values * self._factors + self._offsets).min(axis=0).reshape(_BANDS, _BAND_ROWS)
        return [(number, band.tobytes()) for number, band in enumerate(least)]


def _shingles(text: str) -> set[int]:
    """Hashes of all pieces of `_SHINGLE` characters; of a short text as a whole."""
    pieces = {text[start : start + _SHINGLE] for start in range(max(1, len(text) - _SHINGLE + 1))}
    digests = (hashlib.blake2b(piece.encode(errors="replace"), digest_size=8).digest() for piece in pieces)
    return {int.from_bytes(digest, "big") for digest in digests}


def _similarity(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)


def _repeated_share(token_ids: Sequence[int]) -> float:
    ngrams = [tuple(token_ids[start : start + _NGRAM]) for start in range(len(token_ids) - _NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _script(letter: str) -> str:
    """The first word of a letter's Unicode name, as LATIN or CJK."""
    return unicodedata.name(letter, "UNNAMED").split()[0]
