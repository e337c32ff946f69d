"""Tokenised sources on disk: made once, mapped into memory by all trainers of a host.

A directory `tokens/KEY` holds `tokens.bin`, `first.npy`, `chats.npy` and `facts.json`. The key is a hash of
all that the tokens depend on: content of the files, template, and settings.
"""

import hashlib
import json
import logging
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from eagle_rpc.config.schema import DataConfig
from eagle_rpc.data.dataset import ChatDataset, TokenStore, digest_of
from eagle_rpc.data.sources import data_files, read_records, training_sources
from eagle_rpc.data.template import ChatTemplate
from eagle_rpc.data.tokenising import Counts, Tokeniser, tokenised
from eagle_rpc.errors import DataError
from eagle_rpc.process.files import replaced_directory, replaced_file
from eagle_rpc.process.waiting import BoundedWait
from eagle_rpc.report.progress import Progress

logger = logging.getLogger(__name__)

_FORMAT = 2
_TOKENS, _FIRST, _CHATS, _FACTS = "tokens.bin", "first.npy", "chats.npy", "facts.json"
# Seconds that a process waits for another one that tokenises the same data.
_LONGEST_WAIT = 12 * 3600.0
_HASHED_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class TokenisedSource:
    """The samples of one source and the numbers of the pass that made them."""

    path: str
    store: TokenStore
    counts: Counts

    def require_ids_below(self, vocab_size: int) -> None:
        """Raises `DataError` with the place of the highest token id if the target does not know it."""
        if self.counts.highest_id >= vocab_size:
            raise DataError(
                f"{self.counts.highest_place}: token ids must be below the target's vocabulary size "
                f"{vocab_size}, got {self.counts.highest_id}: the tokenizer is not the target's"
            )


@dataclass(frozen=True, slots=True)
class TokenisedData:
    """All sources of a run."""

    training: list[TokenisedSource]
    validation: TokenisedSource | None

    @property
    def sources(self) -> list[TokenisedSource]:
        return [*self.training, *filter(None, [self.validation])]


def load_data(
    config: DataConfig, template: ChatTemplate, *, cache_dir: str | Path, show_progress: bool = True
) -> TokenisedData:
    """Tokenises the sources that are not in `cache_dir` yet. Raises `DataError`."""

    def load(path: str) -> TokenisedSource:
        return tokenised_source(path, template, config, cache_dir=cache_dir, show_progress=show_progress)

    training = [load(source.path) for source in training_sources(config)]
    return TokenisedData(training, load(config.validation_path) if config.validation_path else None)


def datasets_of(config: DataConfig, data: TokenisedData) -> tuple[ChatDataset, ChatDataset]:
    """Training and validation examples; the second may be empty. Raises `DataError`."""
    weights = [source.weight for source in training_sources(config)]
    stores = [source.store for source in data.training]
    train = ChatDataset.of_stores(stores, weights, max_length=config.max_length)
    if data.validation is None:
        train, validation = train.split(config.validation_share)
    else:
        validation = ChatDataset.of_stores([data.validation.store], [1.0], max_length=config.max_length)
    logger.info("%d samples to train on, %d to validate on", len(train), len(validation))
    return train, validation


def tokenised_source(
    path: str,
    template: ChatTemplate,
    config: DataConfig,
    *,
    cache_dir: str | Path,
    show_progress: bool = True,
) -> TokenisedSource:
    """The samples of one source, from the cache or made anew by one process of the host.

    Raises `DataError` naming file, line and fault unless `config.on_error` is skip, if no chat is left, and
    `WaitTimeout` if another process does not finish the same data.
    """
    root = Path(cache_dir) / "tokens"
    root.mkdir(parents=True, exist_ok=True)
    settings = [_FORMAT, template.identity, config.max_length, config.overlong.name, config.on_error.name]
    identity = json.dumps([content_hash_of(path, root), *settings])
    directory = root / hashlib.sha256(identity.encode()).hexdigest()[:24]
    with _locked(root / f"{directory.name}.lock", path):
        found = _read(directory)
        if found is None:
            _write(directory, path, Tokeniser(template, config), show_progress=show_progress)
            found = _read(directory)
            assert found is not None
    store, counts = found
    logger.info("%s: %s", path, counts.line(config.max_length))
    if not counts.samples:
        raise DataError(f"{path} must leave at least one chat, got {counts.line(config.max_length)}")
    return TokenisedSource(path, store, counts)


def content_hash_of(path: str, root: Path) -> str:
    """Hash over the bytes of the files of a source; of a dataset of the hub, its name.

    The hash of a file is kept in `root` under its size and time of change, so that a later start need not
    read it again.
    """
    files = data_files(path)
    if not files:
        return f"hub {path}"
    index_file = root / "files.json"
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = {}
    known = len(index)
    for file in files:
        index.setdefault(_stamp(file), None)
        index[_stamp(file)] = index[_stamp(file)] or _hash_file(file)
    if len(index) > known:
        with replaced_file(index_file) as fresh:
            fresh.write_text(json.dumps(index), encoding="utf-8")
    return hashlib.sha256("".join(index[_stamp(file)] for file in files).encode()).hexdigest()


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"


def _hash_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _locked(file: Path, path: str) -> filelock.AcquireReturnProxy:
    lock = filelock.FileLock(file)
    wait = BoundedWait(f"another process to tokenise {path}", _LONGEST_WAIT)
    while True:
        try:
            return lock.acquire(timeout=1.0)
        except filelock.Timeout:
            if wait.over:
                raise wait.timeout() from None
            wait.say()


def _write(directory: Path, path: str, tokeniser: Tokeniser, *, show_progress: bool) -> None:
    counts, first, chats = Counts(), array("q", [0]), array("Q")
    progress = Progress("chat", None, title=f"tokenising {path}", shown=show_progress)
    with replaced_directory(directory) as fresh:
        with (fresh / _TOKENS).open("wb") as file:
            for chunk in tokenised(read_records(path), tokeniser):
                file.write(chunk.tokens.tobytes())
                for length, chat in zip(chunk.lengths, chunk.chats, strict=True):
                    first.append(first[-1] + length)
                    chats.append(chat)
                counts.add(chunk.counts)
                progress.advance(lambda: f"{counts.tokens} tokens", count=chunk.counts.chats)
        progress.close()
        np.save(fresh / _FIRST, np.frombuffer(first, dtype=np.int64))
        np.save(fresh / _CHATS, np.frombuffer(chats, dtype=np.uint64))
        digest = digest_of(_map_tokens(fresh / _TOKENS), np.frombuffer(first, dtype=np.int64))
        facts = {"digest": digest, "counts": {name: getattr(counts, name) for name in Counts.__slots__}}
        (fresh / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _read(directory: Path) -> tuple[TokenStore, Counts] | None:
    """The content of a cache; None if there is none or it is damaged."""
    try:
        facts = json.loads((directory / _FACTS).read_text(encoding="utf-8"))
        counts = Counts(**facts["counts"])
        counts.skipped, counts.unread = Counter(counts.skipped), Counter(counts.unread)
        first, chats = np.load(directory / _FIRST, mmap_mode="r"), np.load(directory / _CHATS, mmap_mode="r")
        tokens = _map_tokens(directory / _TOKENS)
        if len(tokens) != first[-1] or len(chats) != len(first) - 1 or len(chats) != counts.samples:
            raise ValueError("its files do not fit together")
        return TokenStore(tokens, first, chats, facts["digest"]), counts
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged and made anew: %s", directory, error)
        return None


def _map_tokens(file: Path) -> "np.ndarray[tuple[int], np.dtype[np.uint32]]":
    if file.stat().st_size == 0:
        return np.empty(0, dtype=np.uint32)
    return np.memmap(file, dtype=np.uint32, mode="r")
