"""Answers of the target to many prompts at once, as fast as its weights allow.

A fixed number of slots decode together, one token each a step, and a finished answer's slot goes to the next prompt. What
all prompts begin with (template, system prompt) is computed once. A prompt's last token is its first decoding step,
so that one kind of step needs logits.

Legend: N rows of one forward, T their tokens, V target vocab.
"""

import heapq
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eagle_rpc.answers.cache import SlotCache, slot_attention
from eagle_rpc.errors import InvalidRequest

# Tokens of one prefill: enough to fill the matrix units, few enough that attention scores stay small.
_PREFILL_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Answer:
    """What the target said to one prompt."""

    key: str
    token_ids: list[int]  # without the end-of-turn token
    truncated: bool  # the target would have gone on: it did not say end-of-turn within its tokens


@dataclass(order=True, slots=True)
class _Row:
    """A prompt, waiting or in a slot, and its answer so far. Orders by `rank`."""

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
    """Decodes submitted prompts, at most `slots` at a time; iterate over `answers()` to run it.

    Greedy answers are those of transformers' `generate` token for token in fp32, whatever else is being decoded.
    Sampling draws from `seed` and the prompt's key alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.slots = slots
        self.max_new_tokens = max_new_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.temperature = temperature
        self.seed = seed
        self.num_generated = 0  # tokens of all answers so far, unfinished ones and ends of turn included
        self._cache = SlotCache(slots, model.config.get_text_config().num_hidden_layers)
        self._waiting: list[_Row] = []
        self._active: list[_Row] = []  # row i of the cache belongs to entry i
        self._num_submitted = 0
        self._prefix: list[int] | None = (
            None  # tokens whose keys and values stand in the first columns of every slot
        )

    def submit(self, key: str, prompt: Sequence[int]) -> None:
        """Queues a prompt, also while `answers()` runs. Longer ones go first, so that rows of a step are alike.

        Raises `InvalidRequest` on an empty prompt.
        """
        if not prompt:
            raise InvalidRequest(f"prompt must hold at least one token, got an empty one for {key!r}")
        row = _Row(
            (-len(prompt), self._num_submitted), key, list(prompt), random.Random(f"{self.seed}/{key}")
        )
        heapq.heappush(self._waiting, row)
        self._num_submitted += 1

    def answers(self) -> Iterator[Answer]:
        """Yields answers as they are finished, until nothing is left."""
        while self._waiting or self._active:
            yield from self._run_until_some_finish()

    @torch.inference_mode()
    def _run_until_some_finish(self) -> list[Answer]:
        with slot_attention(self.model):
            while True:
                # A prefill of a few rows costs as much as one of many, and empty slots cost nothing.
                if len(self._active) <= self.slots * 7 // 8 and self._waiting:
                    self._admit()
                self._decode()
                finished = self._take_finished()
                if finished:
                    return finished

    def _admit(self) -> None:
        """Gives free slots to waiting prompts and computes all of them but their last tokens."""
        rows = [
            heapq.heappop(self._waiting)
            for _ in range(min(self.slots - len(self._active), len(self._waiting)))
        ]
        self._share_prefix(rows)
        start = len(self._prefix)
        while rows:
            length = len(rows[0].prompt) - 1 - start  # the longest
            count = max(1, _PREFILL_TOKENS // max(1, length))
            group, rows = rows[:count], rows[count:]
            if length:
                tokens_NT = torch.tensor(
                    [
                        [*row.prompt[start:-1], *[0] * (len(group[0].prompt) - len(row.prompt))]
                        for row in group
                    ]
                )
                self._forward(
                    len(self._active), tokens_NT, (start + torch.arange(length)).expand_as(tokens_NT)
                )
            self._active += group

    def _share_prefix(self, rows: list[_Row]) -> None:
        """Shortens the prefix to what `rows` share with it, or computes it when there is none yet."""
        others = [row.prompt[:-1] for row in rows] + [
            waiting.prompt[:-1] for waiting in self._waiting if self._prefix is None
        ]
        if self._prefix is not None:
            self._prefix = _common_prefix([self._prefix, *others])
            return
        self._prefix = _common_prefix(others)
        if self._prefix:
            tokens_NT = torch.tensor([self._prefix])
            self._forward(0, tokens_NT, torch.arange(len(self._prefix))[None])
            self._cache.share(len(self._prefix))

    def _decode(self) -> None:
        """Adds one token to every active answer."""
        tokens_N1 = torch.tensor([[row.last_token] for row in self._active])
        positions_N1 = torch.tensor([[row.position] for row in self._active])
        # Besides precision: argmax of bfloat16 takes the CPU ten times as long.
        logits_NV = self._forward(0, tokens_N1, positions_N1).float()
        if self.temperature == 0:
            chosen_N = logits_NV.argmax(dim=-1)
        else:
            chosen_N = _sample(logits_NV / self.temperature, [row.draws.random() for row in self._active])
        for row, token in zip(self._active, chosen_N.tolist(), strict=True):
            row.answer.append(token)
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
        """Removes finished answers; the last active rows move into the gaps, so that active rows stay the first."""
        finished = [
            i
            for i, row in enumerate(self._active)
            if self._ended(row) or len(row.answer) == self.max_new_tokens
        ]
        answers = []
        for i in finished:
            row = self._active[i]
            ended = self._ended(row)
            answers.append(Answer(row.key, row.answer[:-1] if ended else row.answer, truncated=not ended))
        num_left = len(self._active) - len(finished)
        gaps = [i for i in finished if i < num_left]
        movers = sorted(set(range(num_left, len(self._active))) - set(finished))
        if gaps:
            self._cache.move(movers, gaps)
        for gap, mover in zip(gaps, movers, strict=True):
            self._active[gap] = self._active[mover]
        del self._active[num_left:]
        return answers

    def _ended(self, row: _Row) -> bool:
        return row.answer[-1] in self.eos_token_ids


def _common_prefix(sequences: list[list[int]]) -> list[int]:
    first, last = min(sequences), max(sequences)
    length = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
    return first[:length]


def _sample(logits_NV: Tensor, draws: list[float]) -> Tensor:
    """Inverts each row's distribution function at its draw in [0, 1); ids [N]."""
    cumulative_NV = logits_NV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    draws_N1 = torch.tensor(draws, dtype=torch.float64, device=logits_NV.device)[:, None]
    # Right of the draw, hence a token of probability above 0; the total is not exactly 1.
    chosen_N1 = torch.searchsorted(cumulative_NV, draws_N1 * cumulative_NV[:, -1:], right=True)
    return chosen_N1.squeeze(1).clamp(max=logits_NV.shape[1] - 1)
