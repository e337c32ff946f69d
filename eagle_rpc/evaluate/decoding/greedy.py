"""A target that continues one sequence greedily, with a KV cache that can be rolled back.

Legend: N new tokens of a call, P of them whose next tokens are predicted, W width of all captured states, V
target vocab.
"""

import copy
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.sizes.target import aux_layers
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.capture import AuxStates, captured_layers, find_decoder_layers
from eagle_rpc.target.probes import ROUNDING, WHOLE_MODEL, refusing_failures, relative_error


@dataclass(frozen=True, slots=True)
class TargetStep:
    """The target's output for N new tokens."""

    logits_PV: Tensor  # [P, V], after each of the last P tokens
    aux_NW: Tensor  # in the target's dtype

    @property
    def choices(self) -> list[int]:
        """The most likely token after each of the last P tokens."""
        return self.logits_PV.argmax(dim=-1).tolist()

    @property
    def margins(self) -> list[float]:
        """Distances between the two best logits after each of the last P tokens."""
        best_P2 = self.logits_PV.float().topk(2, dim=-1).values
        return (best_P2[:, 0] - best_P2[:, 1]).tolist()


class GreedyTarget:
    """Feeds the tokens of one sequence to a transformers causal LM.

    A cache of keys is cropped to roll back. A recurrent state cannot be cropped: a copy of the cache takes its
    place, and reads the kept tokens again.
    """

    def __init__(self, model: PreTrainedModel, aux_layer_ids: Sequence[int] | None = None) -> None:
        """`aux_layer_ids`: the layers that steps return, counted after the layer; null: the target's default.

        Raises `ConfigError` for layers that the model does not have, `UnsupportedTarget` if its cache does not
        give what the model gives without one.
        """
        self._model = model
        self._layers = find_decoder_layers(model)
        self.aux_layer_ids = aux_layers(len(self._layers), aux_layer_ids)
        self.max_length: int = TargetShape.of(model.config).context or sys.maxsize
        """Tokens of the model's context."""
        self._limits_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        rule = f"to be evaluated, {type(model).__name__} must read tokens into transformers' own cache"
        with refusing_failures(rule), torch.inference_mode():
            self._crops = self._is_croppable()
            self.start()
            self._probe()
        self.start()

    def start(self) -> None:
        """Forgets the sequence; the next `read` begins another."""
        self._cache = DynamicCache(config=self._model.config)
        if self._crops:
            # Sliding windows and convolutions then keep what a roll-back needs.
            self._cache.activate_past_recording()
        self._length = 0
        self._before: tuple[DynamicCache, int, list[int]] | None = None  # cache, its length, tokens since

    def read(self, token_ids: Sequence[int], *, predictions: int, **arguments: Tensor) -> TargetStep:
        """Appends N tokens to the sequence and predicts the next token after each of the last P.

        Further `arguments` are the model's own.
        """
        if not self._crops and self._length and predictions > 1:
            self._before = copy.deepcopy(self._cache), self._length, list(token_ids)
        aux = AuxStates((1, len(token_ids)), len(self.aux_layer_ids))
        with captured_layers(self._layers, self.aux_layer_ids, aux.write):
            logits_PV = self._append(token_ids, predictions, **arguments)
        return TargetStep(logits_PV, aux.states[0])

    def keep(self, length: int) -> None:
        """Rolls the sequence back to its first `length` tokens."""
        surplus = self._length - length
        if self._crops:
            self._cache.crop(-surplus)
            self._length = length
        elif surplus:
            assert self._before is not None, "only what the last call verified rolls back"
            self._cache, self._length, token_ids = self._before
            self._append(token_ids[: length - self._length], 1)

    def _append(self, token_ids: Sequence[int], predictions: int, **arguments: Tensor) -> Tensor:
        """Logits [P, V]; further `arguments` are the model's."""
        ids_1N = torch.tensor([token_ids], device=self._model.device)
        limit = {"logits_to_keep": predictions} if self._limits_logits else {}
        output = self._model(
            input_ids=ids_1N, past_key_values=self._cache, use_cache=True, **limit, **arguments
        )
        self._length += len(token_ids)
        return output.logits[0, -predictions:]

    def _is_croppable(self) -> bool:
        """Only a cache that has seen tokens knows whether its layers have recurrent states."""
        self._crops = True
        self.start()
        self._append(self._probe_ids(2), 1)
        return self._cache.is_croppable

    def _probe(self) -> None:
        """Eight tokens after four, with guesses that are rolled back, against one pass without a cache."""
        ids = self._probe_ids(12)
        expected_PV = self._model(input_ids=torch.tensor([ids], device=self._model.device), use_cache=False)
        steps = [self.read(ids[:4], predictions=1).logits_PV]
        for first, kept, wrong in ((4, 2, ids[:3]), (6, 1, ids[:2]), (7, 4, []), (11, 1, [])):
            read = self.read([*ids[first : first + kept], *wrong], predictions=kept + len(wrong))
            steps.append(read.logits_PV[:kept])
            self.keep(first + kept)
        error = relative_error(torch.cat(steps), expected_PV.logits[0, 3:])
        if not error <= WHOLE_MODEL * ROUNDING[self._model.dtype]:
            name = type(self._model).__name__
            rule = f"to be evaluated, {name} must give with its cache what it gives without one"
            raise UnsupportedTarget(f"{rule}, got a relative error of {error:.1e}")

    def _probe_ids(self, count: int) -> list[int]:
        return torch.linspace(3, TargetShape.of(self._model.config).vocab_size - 1, count).long().tolist()
