"""A target that continues one sequence greedily, with a KV cache that can be rolled back.

Legend: N new tokens of a call, P of them whose next tokens are predicted, H target hidden, V target vocab.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from eagle_rpc.target.capture import AuxStates, aux_layers, captured_layers, find_decoder_layers


@dataclass(frozen=True, slots=True)
class TargetStep:
    """The target's output for N new tokens."""

    logits_PV: Tensor  # [P, V], after each of the last P tokens
    aux_N3H: Tensor  # [N, 3H] in the target's dtype

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
    """Feeds the tokens of one sequence to a transformers causal LM."""

    def __init__(self, model: PreTrainedModel, aux_layer_ids: Sequence[int] | None = None) -> None:
        """`aux_layer_ids`: the layers that steps return, counted after the layer; null: the target's default.

        Raises `ConfigError` for layers that the model does not have.
        """
        self._model = model
        self._layers = find_decoder_layers(model)
        self.aux_layer_ids = aux_layers(len(self._layers), aux_layer_ids)
        self.max_length: int = model.config.get_text_config().max_position_embeddings
        """Tokens of the model's context."""
        self.start()

    def start(self) -> None:
        """Forgets the sequence; the next `read` begins another."""
        # Without the model's config the cache keeps all keys of sliding windows, so these roll back as well.
        self._cache = DynamicCache()

    def read(self, token_ids: Sequence[int], *, predictions: int) -> TargetStep:
        """Appends N tokens to the sequence and predicts the next token after each of the last P."""
        ids_1N = torch.tensor([token_ids], device=self._model.device)
        aux = AuxStates(ids_1N.shape, len(self.aux_layer_ids))
        with captured_layers(self._layers, self.aux_layer_ids, aux.write):
            output = self._model(
                input_ids=ids_1N, past_key_values=self._cache, use_cache=True, logits_to_keep=predictions
            )
        return TargetStep(output.logits[0], aux.states[0])

    def keep(self, length: int) -> None:
        """Rolls the sequence back to its first `length` tokens."""
        surplus = self._cache.get_seq_length() - length
        if surplus:
            self._cache.crop(-surplus)
