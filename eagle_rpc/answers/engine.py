"""Answers of the target to many prompts at once, by continuous batching.

`batch_size` sequences are decoded together, one token each a step; the next prompt takes the place of a
finished answer. The common beginning of all prompts (template, system prompt) is computed once. The last
token of a prompt belongs to the first decoding step, so only decoding steps need logits.

Legend: N rows of one forward, T their new tokens, V target vocab.
"""

import heapq
import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eagle_rpc.answers.answerer import Answer
from eagle_rpc.answers.cache import BatchCache, batch_attention
from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision import TargetShape, weights_fingerprint

# Tokens of one prefill: enough to fill the matrix units, few enough that attention scores stay small.
_PREFILL_TOKENS = 2048
# Most probable tokens among which those of `top_p` are looked for first.
_NUCLEUS_TOKENS = 1024
# Last tokens of an answer that are searched for a stop text.
_STOP_TEXT_TOKENS = 32


@dataclass(order=True, slots=True)
class _Sequence:
    """A prompt and its answer so far. Orders by `rank`: longest prompts first, then by submission."""

    rank: tuple[int, int]
    key: str = field(compare=False)
    prompt: list[int] = field(compare=False)
    draws: random.Random = field(compare=False)
    answer: list[int] = field(compare=False, default_factory=list)

    @property
    def last_token(self) -> int:
        return (self.answer or self.prompt)[-1]

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.answer) - 1


class AnswerEngine:
    """Decodes submitted prompts, at most `batch_size` at a time; iterating over `answers()` runs it.

    Greedy answers equal those of transformers' `generate` token for token in fp32, independently of the rest
    of the batch. Sampling depends on `seed` and the prompt's key alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_size: int,
        max_new_tokens: int,
        stop_token_ids: Collection[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop_texts: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        tokens_after_end: int = 0,
    ) -> None:
        """An answer that comes to hold one of `stop_texts`, which need a tokenizer, ends there, complete.

        `tokens_after_end` more are decoded for `Answer.after_end`.
        """
        self.model = model
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.stop_token_ids = frozenset(stop_token_ids)
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.seed = seed
        self._stop_texts, self._tokenizer = list(stop_texts), tokenizer
        self._tokens_after_end = tokens_after_end
        self.num_generated = 0  # tokens of all answers so far, including unfinished answers and stop tokens
        self._cache = BatchCache(batch_size, model.config.get_text_config().num_hidden_layers)
        self._waiting: list[_Sequence] = []
        self._active: list[_Sequence] = []  # entry i has row i of the cache
        self._num_submitted = 0
        self._prefix: list[int] | None = (
            None  # tokens whose keys and values stand first in every row; null: not known
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model's weights."""
        return weights_fingerprint(self.model)

    @property
    def context(self) -> int | None:
        """Tokens of a prompt and its answer at most; null: the model has no limit."""
        return TargetShape.of(self.model.config).context

    def submit(self, key: str, prompt: Sequence[int], *, draws: str | None = None) -> None:
        """Queues a prompt, also while `answers()` runs. Long prompts go first: a batch has similar lengths.

        Sampling depends on `draws`, by default the key, and on the seed. Raises `InvalidRequest` on an empty prompt.
        """
        if not prompt:
            raise InvalidRequest(f"prompt must hold at least one token, got an empty one for {key!r}")
        rank = (-len(prompt), self._num_submitted)
        sequence = _Sequence(
            rank, key, list(prompt), random.Random(f"{self.seed}/{key if draws is None else draws}")
        )
        heapq.heappush(self._waiting, sequence)
        self._num_submitted += 1

    def answers(self) -> Iterator[Answer]:
        """Yields answers in the order in which they finish, until no prompt is left."""
        while self._waiting or self._active:
            yield from self._run_until_some_finish()

    def step(self) -> list[Answer]:
        """Adds one token to every answer that has a row; returns the answers that this finishes."""
        with torch.inference_mode(), batch_attention(self.model):
            return self._step()

    @torch.inference_mode()
    def drop(self, keys: Collection[str]) -> None:
        """Forgets prompts whose answers are not finished."""
        self._waiting = [one for one in self._waiting if one.key not in keys]
        heapq.heapify(self._waiting)
        self._remove([row for row, one in enumerate(self._active) if one.key in keys])

    @torch.inference_mode()
    def _run_until_some_finish(self) -> list[Answer]:
        with batch_attention(self.model):
            while not (finished := self._step()):
                pass
            return finished

    def _step(self) -> list[Answer]:
        # A prefill of a few prompts costs as much as one of many, and empty rows cost nothing.
        if len(self._active) <= self.batch_size * 7 // 8 and self._waiting:
            self._admit()
        self._decode()
        return self._take_finished()

    def _admit(self) -> None:
        """Gives free rows to waiting prompts and computes all of their tokens except the last."""
        count = min(self.batch_size - len(self._active), len(self._waiting))
        admitted = [heapq.heappop(self._waiting) for _ in range(count)]
        start = self._shared_prefix(admitted)
        while admitted:
            longest = len(admitted[0].prompt) - 1
            length = longest - start
            count = max(1, _PREFILL_TOKENS // max(1, length))
            group, admitted = admitted[:count], admitted[count:]
            if length:
                rows = [[*one.prompt[start:-1], *[0] * (longest + 1 - len(one.prompt))] for one in group]
                tokens_NT = torch.tensor(rows)
                self._forward(len(self._active), tokens_NT, torch.arange(start, longest).expand_as(tokens_NT))
            self._active += group

    def _shared_prefix(self, admitted: list[_Sequence]) -> int:
        """Length of the prefix that all rows of the cache hold: computed once, later only shortened."""
        prompts = [one.prompt[:-1] for one in admitted]
        if self._prefix is not None:
            prefix = _common_prefix([self._prefix, *prompts])
        else:
            prefix = _common_prefix([*prompts, *(one.prompt[:-1] for one in self._waiting)])
            if prefix:
                self._forward(0, torch.tensor([prefix]), torch.arange(len(prefix))[None])
                self._cache.share(len(prefix))
        self._prefix = prefix
        return len(prefix)

    def _decode(self) -> None:
        """Adds one token to every active answer."""
        tokens_N1 = torch.tensor([[sequence.last_token] for sequence in self._active])
        positions_N1 = torch.tensor([[sequence.position] for sequence in self._active])
        # fp32 for precision, and because argmax of bfloat16 takes a CPU ten times as long.
        logits_NV = self._forward(0, tokens_N1, positions_N1).float()
        if self.temperature == 0:
            chosen_N = logits_NV.argmax(dim=-1)
        else:
            likely_NV = _likely(logits_NV / self.temperature, self.top_p, self.top_k)
            chosen_N = _sample(likely_NV, [one.draws.random() for one in self._active])
        for sequence, token in zip(self._active, chosen_N.tolist(), strict=True):
            sequence.answer.append(token)
        self.num_generated += len(self._active)

    def _forward(self, first_row: int, tokens_NT: Tensor, positions_NT: Tensor) -> Tensor:
        """Logits [N, V] of the last tokens."""
        device = self.model.device
        positions_NT = positions_NT.to(device)
        self._cache.aim(first_row, positions_NT)
        output = self.model(
            input_ids=tokens_NT.to(device),
            position_ids=positions_NT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _take_finished(self) -> list[Answer]:
        """Removes finished sequences."""
        answers, finished = [], []
        for row, sequence in enumerate(self._active):
            length = max(0, len(sequence.answer) - self._tokens_after_end)
            said, after_end = sequence.answer[:length], tuple(sequence.answer[length:])
            if said and said[-1] in self.stop_token_ids:
                answers.append(
                    Answer(sequence.key, said[:-1], False, stop_token=said[-1], after_end=after_end)
                )
            elif said and self._holds_stop_text(said):
                answers.append(Answer(sequence.key, said, truncated=False))
            elif length == self.max_new_tokens:
                answers.append(Answer(sequence.key, said, truncated=True, after_end=after_end))
            else:
                continue
            finished.append(row)
        self._remove(finished)
        return answers

    def _holds_stop_text(self, answer: list[int]) -> bool:
        if not self._stop_texts or self._tokenizer is None:
            return False
        end = str(self._tokenizer.decode(answer[-_STOP_TEXT_TOKENS:]))
        return any(text in end for text in self._stop_texts)

    def _remove(self, rows: list[int]) -> None:
        """Frees `rows`, in ascending order. The last active rows move into the gaps: active rows come first."""
        num_left = len(self._active) - len(rows)
        gaps = [row for row in rows if row < num_left]
        movers = sorted(set(range(num_left, len(self._active))) - set(rows))
        if gaps:
            self._cache.move(movers, gaps)
        for gap, mover in zip(gaps, movers, strict=True):
            self._active[gap] = self._active[mover]
        del self._active[num_left:]


def _common_prefix(sequences: list[list[int]]) -> list[int]:
    # Where any two differ, the first and the last in lexical order differ.
    pairs = zip(min(sequences), max(sequences), strict=False)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _likely(logits_NV: Tensor, top_p: float, top_k: int) -> Tensor:
    """Logits in which all tokens but the `top_k` best and the fewest of probability `top_p` are -inf."""
    if top_k:
        least_N1 = logits_NV.topk(min(top_k, logits_NV.shape[1]), dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    if top_p < 1:
        total_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
        least_N1 = _least_likely(logits_NV, total_N1, top_p, _NUCLEUS_TOKENS)
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    return logits_NV


def _least_likely(logits_NV: Tensor, total_N1: Tensor, top_p: float, count: int) -> Tensor:
    """The lowest logit [N, 1] among the fewest tokens of probability `top_p`, which `count` tokens may hold."""
    # Most rows need a small part of the vocabulary, and to sort all of it costs more than a forward.
    best_NK = logits_NV.topk(min(count, logits_NV.shape[1]), dim=-1).values
    last_N1 = ((best_NK - total_N1).exp().cumsum(dim=-1) < top_p).sum(dim=-1, keepdim=True)
    least_N1 = best_NK.gather(1, last_N1.clamp(max=best_NK.shape[1] - 1))
    wide_N = last_N1.squeeze(1) == best_NK.shape[1]
    if count < logits_NV.shape[1] and wide_N.any():
        least_N1[wide_N] = _least_likely(logits_NV[wide_N], total_N1[wide_N], top_p, logits_NV.shape[1])
    return least_N1


def _sample(logits_NV: Tensor, draws: list[float]) -> Tensor:
    """Ids [N]: the inverse of each row's distribution function at its draw in [0, 1)."""
    cumulative_NV = logits_NV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    draws_N1 = torch.tensor(draws, dtype=torch.float64, device=logits_NV.device)[:, None]
    # On the right of the draw, so never a token of probability 0; scaled, since the total is not exactly 1.
    chosen_N1 = torch.searchsorted(cumulative_NV, draws_N1 * cumulative_NV[:, -1:], right=True)
    return chosen_N1.squeeze(1).clamp(max=logits_NV.shape[1] - 1)
