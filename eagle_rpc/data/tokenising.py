"""One pass over the records of a source: chats become samples, by all cores where there are many."""

import itertools
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eagle_rpc.config.choices import Overlong
from eagle_rpc.config.schema import DataConfig
from eagle_rpc.data.dataset import chat_hash, pack_tokens
from eagle_rpc.data.problems import Record, RecordProblems, describe
from eagle_rpc.data.records import describe_unread, parse_chat
from eagle_rpc.data.samples import Sample
from eagle_rpc.data.template import ChatTemplate
from eagle_rpc.process import die_with_parent

# Records that one process takes at a time, and the number up to which no processes are started for them.
_CHUNK, _FEW = 256, 4096


@dataclass(slots=True)
class Counts:
    """Numbers of one pass."""

    chats: int = 0
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    dropped: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # records left out, by kind of fault
    unread: Counter[str] = field(default_factory=Counter)  # keys that records have and nothing reads
    highest_id: int = -1
    highest_place: str = ""  # the record that holds it

    def add(self, other: "Counts") -> None:
        for name in ("chats", "samples", "tokens", "supervised", "truncated", "dropped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.skipped += other.skipped
        self.unread += other.unread
        if other.highest_id > self.highest_id:
            self.highest_id, self.highest_place = other.highest_id, other.highest_place

    def line(self, max_length: int) -> str:
        """For people."""
        unread = f"; {describe_unread(self.unread)}" if self.unread else ""
        return (
            f"{self.chats} chats in {self.samples} samples, {self.tokens} tokens, {self.supervised} of them "
            f"supervised; {self.truncated} samples truncated to {max_length} tokens, "
            f"{self.dropped} dropped as too long, {describe(self.skipped)}{unread}"
        )


@dataclass(frozen=True, slots=True)
class TokenisedChunk:
    """The samples of some records, one after the other."""

    tokens: NDArray[np.uint32]  # as `pack_tokens` makes them
    lengths: list[int]  # of each sample
    chats: list[int]  # hash of the chat of each sample
    counts: Counts


@dataclass(frozen=True, slots=True)
class Tokeniser:
    """Makes samples of records. Raises `DataError` for a broken one unless `config.on_error` is skip."""

    template: ChatTemplate
    config: DataConfig

    def __call__(self, records: Iterable[Record]) -> TokenisedChunk:
        problems, counts = RecordProblems(self.config.on_error), Counts()
        rows: list[NDArray[np.uint32]] = []
        chats: list[int] = []
        for place, record in records:
            with problems.record(place):
                samples = self.template.samples(parse_chat(record, place, unread=counts.unread))
                kept = [one for one in (self._shortened(sample, counts) for sample in samples) if one]
                packed = [pack_tokens(sample.ids, sample.mask) for sample in kept]
                rows += packed
                chats += [chat_hash(packed)] * len(packed)
                counts.chats += bool(packed)
                counts.supervised += sum(sum(sample.mask) for sample in kept)
                highest = max((max(sample.ids) for sample in kept), default=-1)
                if highest > counts.highest_id:
                    counts.highest_id, counts.highest_place = highest, place
        counts.samples, counts.skipped = len(rows), problems.skipped
        counts.tokens = sum(map(len, rows))
        tokens = np.concatenate([*rows, np.empty(0, dtype=np.uint32)])
        return TokenisedChunk(tokens, [len(row) for row in rows], chats, counts)

    def _shortened(self, sample: Sample, counts: Counts) -> Sample | None:
        """A sample of at most the longest length; None if it is dropped."""
        length = self.config.max_length
        if len(sample.ids) <= length:
            return sample
        if self.config.overlong is Overlong.drop or not any(sample.mask[1:length]):
            counts.dropped += 1
            return None
        counts.truncated += 1
        return Sample(sample.ids[:length], sample.mask[:length])


def tokenised(records: Iterator[Record], tokeniser: Tokeniser) -> Iterator[TokenisedChunk]:
    """The samples of all records in their order."""
    few = list(itertools.islice(records, _FEW))
    workers = tokeniser.config.workers or len(os.sched_getaffinity(0))
    chunks = _chunks(itertools.chain(few, records))
    if len(few) < _FEW or workers == 1:
        yield from map(tokeniser, chunks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(tokeniser,))
    try:
        yield from _in_order(lambda chunk: pool.submit(_tokenise, chunk), chunks, ahead=4 * workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(itertools.islice(records, _CHUNK)):
        yield chunk


def _in_order(
    submit: Callable[[list[Record]], Future[TokenisedChunk]], chunks: Iterator[list[Record]], *, ahead: int
) -> Iterator[TokenisedChunk]:
    """Results in the order of the chunks, of which at most `ahead` are under way."""
    under_way: deque[Future[TokenisedChunk]] = deque()
    for chunk in chunks:
        under_way.append(submit(chunk))
        if len(under_way) >= ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


_worker: Tokeniser  # of a process that `tokenised` has started


def _prepare(tokeniser: Tokeniser) -> None:
    global _worker
    die_with_parent()
    _worker = tokeniser


def _tokenise(records: list[Record]) -> TokenisedChunk:
    return _worker(records)
