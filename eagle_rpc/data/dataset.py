"""Tokenised chats, in memory or in files that are mapped into memory.

Legend: L tokens of one example, C examples.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle_rpc.errors import DataError

# The highest bit of a stored token is its loss mask.
_SUPERVISED = np.uint32(2**31)
_ID_BITS = np.uint32(2**31 - 1)
# Examples that are counted at a time.
_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Example:
    """One sample. `loss_mask` is true at the assistant's tokens, at least once after the first token."""

    input_ids: Tensor  # [L] int64
    loss_mask: Tensor  # [L] bool


@dataclass(frozen=True, slots=True)
class TokenStore:
    """Samples one after the other: sample i has the tokens `first_C1[i]` to `first_C1[i + 1]`."""

    tokens: NDArray[np.uint32]  # ids, with the loss mask as highest bit
    first_C1: NDArray[np.int64]  # C + 1 of them
    chats_C: NDArray[np.uint64]  # hash of the chat that a sample is of
    digest: str  # of all the above

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "TokenStore":
        """Examples in memory; each is a chat of its own."""
        rows = [pack_tokens(one.input_ids.numpy(), one.loss_mask.numpy()) for one in examples]
        first = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
        tokens = np.concatenate([*rows, np.empty(0, dtype=np.uint32)])
        chats = np.array([chat_hash([row]) for row in rows], dtype=np.uint64)
        return cls(tokens, first, chats, digest_of(tokens, first))


def pack_tokens(
    ids: Sequence[int] | NDArray[np.int64], mask: Sequence[bool] | NDArray[np.bool_]
) -> NDArray[np.uint32]:
    """Ids and loss mask as they are stored, [L]."""
    return np.asarray(ids, dtype=np.uint32) | (np.asarray(mask, dtype=np.uint32) << np.uint32(31))


def chat_hash(samples: Sequence[NDArray[np.uint32]]) -> int:
    """64 bits of a hash over the samples of one chat."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.tobytes() + b"/")
    return int.from_bytes(digest.digest()[:8], "big")


def digest_of(tokens: NDArray[np.uint32], first_C1: NDArray[np.int64]) -> str:
    """Hash of samples in their order."""
    digest = hashlib.sha256(first_C1.tobytes())
    for start in range(0, len(tokens), 2**24):
        digest.update(tokens[start : start + 2**24].tobytes())
    return digest.hexdigest()


class ChatDataset(Sequence[Example]):
    """Examples of at most `max_length` tokens."""

    def __init__(self, examples: Sequence[Example], *, max_length: int) -> None:
        store = TokenStore.of(examples)
        self._init([store], np.arange(len(examples)), max_length)

    @classmethod
    def of_stores(
        cls, stores: Sequence[TokenStore], weights: Sequence[float], *, max_length: int
    ) -> "ChatDataset":
        """All samples of the stores: of a weight 2.5 two or three times, of 0.5 a half, by a hash of the chat."""
        indices, first = [], 0
        for store, weight in zip(stores, weights, strict=True):
            here = np.arange(first, first + len(store.chats_C))
            # Other bits of the hash than those that choose the validation set.
            part = (store.chats_C * np.uint64(0x9E3779B97F4A7C15)).astype(np.float64) / 2.0**64 < weight % 1
            indices += [here] * int(weight) + [here[part]]
            first += len(here)
        dataset = cls.__new__(cls)
        dataset._init(stores, np.concatenate(indices), max_length)
        return dataset

    def _init(self, stores: Sequence[TokenStore], indices: NDArray[np.int64], max_length: int) -> None:
        self.max_length = max_length
        self._stores = list(stores)
        self._starts = np.cumsum([0, *(len(store.chats_C) for store in stores)])
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        row = self._row(int(self._indices[index]))
        ids = torch.from_numpy((row & _ID_BITS).astype(np.int64))
        return Example(ids, torch.from_numpy((row & _SUPERVISED) != 0))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, [C]."""
        return np.concatenate([np.diff(store.first_C1) for store in self._stores])[self._indices]

    @cached_property
    def digest(self) -> str:
        """Hash of all examples in order."""
        parts = "".join(store.digest for store in self._stores).encode()
        return hashlib.sha256(parts + self._indices.tobytes()).hexdigest()

    def split(self, validation_share: float) -> tuple["ChatDataset", "ChatDataset"]:
        """Training and validation examples, chosen by a hash of their chat: equal chats stay together.

        If two chats differ, at least one is for validation, unless `validation_share` is 0. Raises
        `DataError` if no chat is left for training.
        """
        hashes = np.concatenate([store.chats_C for store in self._stores])[self._indices]
        places = hashes / 2.0**64
        threshold = validation_share
        if validation_share > 0 and len(np.unique(hashes)) > 1:
            threshold = max(validation_share, math.nextafter(float(places.min()), 1.0))
        train, validation = (self._part(places >= threshold), self._part(places < threshold))
        if not len(train):
            raise DataError(
                f"data.validation_share must leave chats to train on, got {validation_share} of {len(self)} "
                "chats"
            )
        return train, validation

    def token_counts(self, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How often each token occurs at all, and how often the draft has to guess it, both [vocab_size].

        A supervised token is judged by the target's output there, which predicts the token after it. Raises
        `DataError` for ids outside the vocabulary.
        """
        all_V, guessed_V = np.zeros(vocab_size, dtype=np.int64), np.zeros(vocab_size, dtype=np.int64)
        for rows in self._blocks():
            tokens = np.concatenate(rows)
            ids = tokens & _ID_BITS
            if (highest := int(ids.max())) >= vocab_size:
                raise DataError(
                    f"token ids must be below the target's vocabulary size {vocab_size}, got {highest}: "
                    "the tokenizer is not the target's"
                )
            supervised = (tokens & _SUPERVISED) != 0
            supervised[np.cumsum([len(row) for row in rows]) - 1] = False  # no token follows in its sample
            all_V += np.bincount(ids, minlength=vocab_size)
            guessed_V += np.bincount(ids[1:][supervised[:-1]], minlength=vocab_size)
        return all_V, guessed_V

    def _blocks(self) -> Iterator[list[NDArray[np.uint32]]]:
        for start in range(0, len(self), _BLOCK):
            yield [self._row(int(index)) for index in self._indices[start : start + _BLOCK]]

    def _row(self, index: int) -> NDArray[np.uint32]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        store, inside = self._stores[number], index - int(self._starts[number])
        return store.tokens[store.first_C1[inside] : store.first_C1[inside + 1]]

    def _part(self, chosen: NDArray[np.bool_]) -> "ChatDataset":
        part = ChatDataset.__new__(ChatDataset)
        part._init(self._stores, self._indices[chosen], self.max_length)
        return part
