"""Answers to prompts: the forward thread decodes them, a slice at a time, between forward passes.

The process that serves injects the decoder, so that this room knows neither models nor engines.
"""

import itertools
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import EagleRpcError, TargetBusy, TargetDraining, UnsupportedTarget
from eagle_rpc.process.waiting import Clock
from eagle_rpc.service.fairness import LONGEST_RETRY, Demand, FairQueue, Work
from eagle_rpc.service.forward_pass import outcome_of
from eagle_rpc.supervision import AnswerSettings, PromptAnswer

SLICE_SECONDS = 0.1
"""Seconds of decoding between two forward passes while both are wanted; a step that takes longer is ended."""

# Tokens of prompts after which no further prompt is read in the same step.
_READ_TOKENS = 8192


class Decoded(Protocol):
    """An answer that a decoder has finished."""

    @property
    def key(self) -> str: ...  # as submitted
    @property
    def said_ids(self) -> list[int]: ...  # with the stop token unless `truncated`
    @property
    def truncated(self) -> bool: ...  # it reached its limit without a stop token


class Decoder(Protocol):
    """Decodes prompts of equal settings together. Only the forward thread calls it."""

    def submit(self, key: str, prompt: Sequence[int], *, draws: str) -> None:
        """Takes a prompt. `key` is unique here; sampling depends on `draws` and the seed alone."""

    def step(self) -> Collection[Decoded]:
        """Reads a few prompts, or adds a token to each answer; returns the answers that this finishes."""

    def drop(self, keys: Collection[str]) -> None:
        """Forgets prompts that are not answered yet."""


class Answering(Protocol):
    """The way in which a target answers prompts."""

    def check(self) -> None:
        """Raises `UnsupportedTarget` if it answers none. The forward thread calls it."""

    def decoder(self, settings: AnswerSettings, num_rows: int) -> Decoder:
        """A decoder of at most `num_rows` prompts at a time. Raises as `check`."""


class AnswerDesk:
    """Prompts of all sessions, which take turns by run. One decoder works at a time.

    Prompts of other settings than its own wait until the decoder has none left. Any thread may submit and
    remove prompts; only the forward thread runs slices.
    """

    def __init__(
        self, answering: Answering | None, config: TargetConfig, demand: Demand, clock: Clock
    ) -> None:
        """`answering` None: the target answers no prompts."""
        self._answering = answering
        self._max_answers, self._max_tokens = config.max_answers, config.max_answer_tokens
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting = FairQueue(config, demand, most="max_answers", most_of_session="max_answers")
        self._running: dict[str, Work] = {}  # by key at the decoder
        self._decoding: set[str] = set()  # keys that the decoder has
        self._keys = map(str, itertools.count())
        self._settings: AnswerSettings | None = None  # of the decoder
        self._decoder: Decoder | None = None

    @property
    def busy(self) -> bool:
        """Whether a slice has something to do."""
        return bool(self._waiting or self._running or self._decoder)

    @property
    def num_waiting(self) -> int:
        with self._lock:
            return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def check(self) -> Answering:
        """The way of answering. Raises `UnsupportedTarget` if there is none. The forward thread calls it."""
        if self._answering is None:
            raise UnsupportedTarget("this target answers no prompts: no engine decodes its model in batches")
        self._answering.check()
        return self._answering

    def submit(self, work: Work) -> None:
        """Queues a prompt, or replaces one that waits under its id. Raises as `FairQueue.put`."""
        with self._lock:
            try:
                replaced = self._waiting.put(work, self._running.values())
            except TargetBusy as busy:
                busy.retry_after = LONGEST_RETRY
                raise
        if replaced is not None:
            replaced.finish_replaced()

    def remove(self, unwanted: Callable[[Work], bool], reason: EagleRpcError) -> int:
        """Answers all prompts for which `unwanted` holds with `reason`; returns their number."""
        with self._lock:
            removed = self._waiting.remove(unwanted)
            for key in [key for key, work in self._running.items() if unwanted(work)]:
                removed.append(self._running.pop(key))
        for work in removed:
            work.finish(reason)
        return len(removed)

    def refuse_waiting(self) -> None:
        """Answers prompts that no decoder works on yet with `TargetDraining`: they are asked elsewhere."""
        with self._lock:
            waiting = self._waiting.remove(lambda work: True)
        for work in waiting:
            work.finish(TargetDraining("the target is shutting down and has not begun to answer this prompt"))

    # --- the forward thread

    def run_slice(self) -> None:
        """Decodes for `SLICE_SECONDS`, or for one step that takes longer."""
        end = self._clock() + SLICE_SECONDS
        while self._take_turns():
            outcome = outcome_of(self._step)
            for work, answer in self._answered(outcome):
                work.finish(answer)
            if self._clock() >= end:
                return

    def _take_turns(self) -> bool:
        """Gives free rows to waiting prompts; whether there is anything to decode."""
        with self._lock:
            if not self._running:
                # Frees the keys and values.
                self._decoder, self._decoding = None, set()
            num_tokens = 0
            while (first := self._waiting.first()) is not None and num_tokens < _READ_TOKENS:
                settings: AnswerSettings = first.request.settings
                if not self._running:
                    self._settings = settings
                if settings != self._settings or len(self._running) >= self._num_rows(settings):
                    break
                self._waiting.take()
                self._running[next(self._keys)] = first
                num_tokens += len(first.request.token_ids)
            return bool(self._running)

    def _num_rows(self, settings: AnswerSettings) -> int:
        return max(1, min(self._max_answers, self._max_tokens // settings.max_length))

    def _step(self) -> Collection[Decoded]:
        with self._lock:
            running = dict(self._running)
        if self._decoder is None:
            assert self._settings is not None
            self._decoder = self.check().decoder(self._settings, self._num_rows(self._settings))
        self._decoder.drop(self._decoding - running.keys())
        for key, work in running.items():
            if key not in self._decoding:
                self._decoder.submit(key, work.request.token_ids.tolist(), draws=work.request.key)
        self._decoding = set(running)
        return self._decoder.step()

    def _answered(self, outcome: Collection[Decoded] | EagleRpcError) -> list[tuple[Work, Any]]:
        """The prompts that end with the outcome of a step, and their answers; an error ends all."""
        with self._lock:
            if isinstance(outcome, EagleRpcError):
                failed, self._running, self._decoder = list(self._running.values()), {}, None
                return [(work, outcome) for work in failed]
            said = [one for one in outcome if one.key in self._running]
            self._decoding -= {one.key for one in said}
            return [
                (self._running.pop(one.key), PromptAnswer(torch.tensor(one.said_ids), one.truncated))
                for one in said
            ]
