"""Answers by transformers' own `generate`, for models that the batched engine does not decode."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from eagle_rpc.answers.answerer import Answer
from eagle_rpc.supervision import TargetShape, weights_fingerprint


class PlainAnswerer:
    """An `Answerer` that decodes prompts of equal length together, so that none is padded.

    Sampling depends on the seed and on the prompts of a batch.
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
        tokenizer: Any = None,
        tokens_after_end: int = 0,
    ) -> None:
        """`tokens_after_end` more are decoded for `Answer.after_end`; every answer then takes the longest time."""
        self.num_generated = 0
        self._max_new_tokens, self._tokens_after_end = max_new_tokens, tokens_after_end
        self._model, self._batch_size, self._seed = model, batch_size, seed
        self._stop = frozenset(stop_token_ids)
        self._waiting: defaultdict[int, list[tuple[str, list[int]]]] = defaultdict(list)
        self._options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens + tokens_after_end,
            "eos_token_id": [] if tokens_after_end else sorted(self._stop),
            "pad_token_id": min(self._stop, default=0),
            "use_cache": True,
            "do_sample": temperature > 0,
        }
        if temperature > 0:
            self._options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        if stop_texts:
            self._options |= {"stop_strings": list(stop_texts), "tokenizer": tokenizer}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model's weights."""
        return weights_fingerprint(self._model)

    @property
    def context(self) -> int | None:
        """Tokens of a prompt and its answer at most; null: the model has no limit."""
        return TargetShape.of(self._model.config).context

    def submit(self, key: str, prompt: Sequence[int]) -> None:
        """Queues a prompt, also while `answers()` runs."""
        self._waiting[len(prompt)].append((key, list(prompt)))

    def answers(self) -> Iterator[Answer]:
        """Yields answers batch by batch, until no prompt is left."""
        while self._waiting:
            length = max(self._waiting)
            waiting = self._waiting[length]
            batch, waiting[:] = waiting[: self._batch_size], waiting[self._batch_size :]
            if not waiting:
                del self._waiting[length]
            yield from self._answer(batch)

    @contextmanager
    def _own_settings(self) -> Iterator[None]:
        """Inside the block the model's own penalties and forced tokens do not shape what it says."""
        usual, self._model.generation_config = self._model.generation_config, GenerationConfig()
        try:
            yield
        finally:
            self._model.generation_config = usual

    @torch.inference_mode()
    def _answer(self, batch: list[tuple[str, list[int]]]) -> Iterator[Answer]:
        keys = "/".join([str(self._seed), *(key for key, _ in batch)])
        torch.manual_seed(int.from_bytes(hashlib.sha256(keys.encode()).digest()[:8], "big"))
        ids_NT = torch.tensor([prompt for _, prompt in batch], device=self._model.device)
        generate: Any = self._model.generate  # its types are those of a decorator
        with self._own_settings():
            said_NT = generate(input_ids=ids_NT, attention_mask=torch.ones_like(ids_NT), **self._options)
        for (key, prompt), row in zip(batch, said_NT.tolist(), strict=True):
            everything = row[len(prompt) :]
            said = everything[: self._max_new_tokens]
            stop = next((index for index, token in enumerate(said) if token in self._stop), None)
            # A row that ended by a text is padded by a stop token, if others went on.
            length = len(said) if stop is None else stop + 1
            self.num_generated += length
            truncated = stop is None and length == self._max_new_tokens
            after_end = tuple(everything[length : length + self._tokens_after_end])
            yield (
                Answer(key, said, truncated, after_end=after_end)
                if stop is None
                else Answer(key, said[:stop], False, stop_token=said[stop], after_end=after_end)
            )
