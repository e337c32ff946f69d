"""Times of the calls of target and draft for a batch.

Legend: B sequences, S tokens of each in a call, H draft hidden, W width of all captured states.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from eagle_rpc.draft import Eagle3Draft
from eagle_rpc.evaluate.speed import CallTimes
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.capture import find_base

# The median of the repetitions counts; calls before them allocate memory and choose kernels.
_REPETITIONS, _WARM_UP = 7, 2


@torch.inference_mode()
def time_calls(
    model: PreTrainedModel, draft: Eagle3Draft, *, batch_size: int, context: int, num_draft_tokens: int
) -> CallTimes:
    """Measures target and draft on the target's device, with `context` tokens in their caches."""
    sizes = range(2, num_draft_tokens + 2)
    target = _TargetCalls(model, batch_size, context)
    of_target = {size: _seconds(partial(target.call, size), model.device) for size in (1, *sizes)}
    calls = _DraftCalls(draft, batch_size, context)
    return CallTimes(
        batch_size=batch_size,
        context=context,
        target=of_target,
        draft_read={size: _seconds(partial(calls.read, size), model.device) for size in sizes},
        draft_guess=_seconds(calls.guess, model.device),
    )


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    measured = []
    for _ in range(_WARM_UP + _REPETITIONS):
        _finish(device)
        started = time.perf_counter()
        call()
        _finish(device)
        measured.append(time.perf_counter() - started)
    return statistics.median(measured[_WARM_UP:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _TargetCalls:
    """Each call appends tokens and takes them away again; recurrent states cannot, and go on."""

    def __init__(self, model: PreTrainedModel, batch_size: int, context: int) -> None:
        self._model, self._batch_size = model, batch_size
        self._generator = torch.Generator().manual_seed(0)
        self._cache = DynamicCache(config=model.config)
        self._cache.activate_past_recording()
        ids_BS = self._ids(context)
        # Without the head, whose logits of all tokens would fill the memory.
        find_base(model)(input_ids=ids_BS, past_key_values=self._cache, use_cache=True)
        self._crops = self._cache.is_croppable

    def call(self, size: int) -> None:
        """Includes the head and the choice of the most likely tokens."""
        output = self._model(input_ids=self._ids(size), past_key_values=self._cache, use_cache=True)
        output.logits.argmax(dim=-1)
        if self._crops:
            self._cache.crop(-size)

    def _ids(self, size: int) -> Tensor:
        """Random tokens, since equal ones would all go to the same experts."""
        shape, vocab_size = (self._batch_size, size), TargetShape.of(self._model.config).vocab_size
        return torch.randint(vocab_size, shape, generator=self._generator).to(self._model.device)


class _DraftCalls:
    def __init__(self, draft: Eagle3Draft, batch_size: int, context: int) -> None:
        self._draft, self._batch_size, self._context = draft, batch_size, context
        self._cache = draft.new_cache()
        self.read(context, keep=True)

    def read(self, size: int, *, keep: bool = False) -> None:
        """The pass over verified tokens with their captured states, which gives the first guess."""
        weight = self._draft.fc.weight
        aux_BSW = weight.new_zeros(self._batch_size, size, weight.shape[1])
        self._step(size, self._draft.fuse(aux_BSW), keep=keep)

    def guess(self) -> None:
        """The pass over one guess."""
        hidden_size = self._draft.config.hidden_size
        self._step(1, self._draft.fc.weight.new_zeros(self._batch_size, 1, hidden_size), keep=False)

    def _step(self, size: int, hidden_BSH: Tensor, *, keep: bool) -> None:
        ids_BS = torch.zeros(self._batch_size, size, dtype=torch.int64, device=hidden_BSH.device)
        _, logits_BK = self._draft.decode_step(ids_BS, hidden_BSH, self._cache)
        logits_BK.argmax(dim=-1)
        if not keep:
            self._cache.truncate(self._context)
