"""Chats as tokenised examples.

Legend: L tokens of one example.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from eagle_rpc.config.choices import Overlong
from eagle_rpc.config.schema import DataConfig
from eagle_rpc.data.chats import ChatFile, read_chats
from eagle_rpc.data.problems import RecordProblems, describe
from eagle_rpc.data.template import ChatTemplate
from eagle_rpc.errors import DataError
from eagle_rpc.report.progress import with_progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """One chat. `loss_mask` is true at the assistant's tokens, at least once after the first token."""

    input_ids: Tensor  # [L] int64
    loss_mask: Tensor  # [L] bool

    @property
    def digest(self) -> str:
        """Hash of the tokens and their mask."""
        return hashlib.sha256(self.input_ids.numpy().tobytes() + self.loss_mask.numpy().tobytes()).hexdigest()


class ChatDataset(Sequence[Example]):
    """Examples of at most `max_length` tokens, in memory."""

    def __init__(self, examples: Sequence[Example], *, max_length: int) -> None:
        self.max_length = max_length
        self._examples = list(examples)

    @classmethod
    def load(
        cls, path: str | Path, template: ChatTemplate, config: DataConfig, *, show_progress: bool = True
    ) -> "ChatDataset":
        """Reads and tokenises a chat file.

        Chats over `config.max_length` are cut or dropped (`config.overlong`); a chat that a cut leaves
        without supervised token is dropped. Raises `DataError` naming file, line and fault unless
        `config.on_error` is skip, and if no chat is left.
        """
        tokenising = _Tokenising(read_chats(path, on_error=config.on_error), template, config)
        examples = list(tokenising.examples(show_progress))
        if not examples:
            raise DataError(f"{path} must leave at least one chat, got {tokenising.summary(examples)}")
        logger.info("%s: %s", path, tokenising.summary(examples))
        return cls(examples, max_length=config.max_length)

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self._examples[index]

    @cached_property
    def digest(self) -> str:
        """Hash of all examples in order."""
        return hashlib.sha256("".join(example.digest for example in self).encode()).hexdigest()

    def split(self, validation_share: float) -> tuple["ChatDataset", "ChatDataset"]:
        """Training and validation examples, chosen by a hash of their content: equal chats stay together.

        If two chats differ, at least one is for validation, unless `validation_share` is 0. Raises
        `DataError` if no chat is left for training.
        """
        places = [int(example.digest[:16], 16) / 2**64 for example in self]
        threshold = validation_share
        if validation_share > 0 and len(set(places)) > 1:
            threshold = max(validation_share, math.nextafter(min(places), 1.0))
        train = [example for example, place in zip(self, places, strict=True) if place >= threshold]
        validation = [example for example, place in zip(self, places, strict=True) if place < threshold]
        if not train:
            raise DataError(
                f"data.validation_share must leave chats to train on, got {validation_share} of {len(self)} "
                "chats"
            )
        train_set, validation_set = (ChatDataset(p, max_length=self.max_length) for p in (train, validation))
        return train_set, validation_set


def load_datasets(
    config: DataConfig, template: ChatTemplate, *, show_progress: bool = True
) -> tuple[ChatDataset, ChatDataset]:
    """Training and validation examples; the second may be empty. Raises `DataError`."""
    train = ChatDataset.load(config.train_path, template, config, show_progress=show_progress)
    if config.validation_path is None:
        train, validation = train.split(config.validation_share)
    else:
        validation = ChatDataset.load(config.validation_path, template, config, show_progress=show_progress)
    logger.info("%d chats to train on, %d to validate on", len(train), len(validation))
    return train, validation


class _Tokenising:
    """One pass over a chat file, and the counts of truncated and dropped chats."""

    def __init__(self, file: ChatFile, template: ChatTemplate, config: DataConfig) -> None:
        self._file = file
        self._template = template
        self._config = config
        self._problems = RecordProblems(file.path, config.on_error)
        self._truncated = 0
        self._dropped = 0

    def examples(self, show_progress: bool) -> Iterator[Example]:
        title = f"tokenising {self._file.path.name}"
        for chat in with_progress(self._file.chats, "chat", title=title, shown=show_progress):
            with self._problems.record(chat.line):
                for sample in self._template.samples(chat):
                    ids, mask = sample.ids, sample.mask
                    if len(ids) > self._config.max_length:
                        ids, mask = self._shorten(ids, mask)
                    if ids:
                        yield Example(
                            torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool)
                        )

    def summary(self, examples: Sequence[Example]) -> str:
        tokens = sum(len(example.input_ids) for example in examples)
        supervised = sum(int(example.loss_mask.sum()) for example in examples)
        return (
            f"{len(examples)} chats, {tokens} tokens, {supervised} of them supervised; "
            f"{self._truncated} chats truncated to {self._config.max_length} tokens, "
            f"{self._dropped} dropped as too long, {describe(self._file.skipped + self._problems.skipped)}"
        )

    def _shorten(self, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
        """The beginning of an overlong chat, or nothing if it is dropped."""
        length = self._config.max_length
        if self._config.overlong is Overlong.drop or not any(mask[1:length]):
            self._dropped += 1
            return [], []
        self._truncated += 1
        return ids[:length], mask[:length]
