"""Reading decoder layers while the model runs.

Legend: B batch, T sequence, H target hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_rpc.errors import ConfigError, UnsupportedTarget


def find_base(model: PreTrainedModel) -> nn.Module:
    """The model without its head. Raises `UnsupportedTarget` if it has no such part."""
    base = getattr(model, model.base_model_prefix, None)
    if not isinstance(base, nn.Module):
        raise UnsupportedTarget(
            f"{type(model).__name__} has no submodule {model.base_model_prefix!r} beside its head"
        )
    return base


def run_base(base: nn.Module, input_ids: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """Last hidden states [B, T, H] of [B, T] ids, padded on the right.

    Padding is not masked: on the right it is invisible to causal attention. Positions that restart in a row say where chats end:
    those see only themselves.
    """
    positions = {} if positions_BT is None else {"position_ids": positions_BT}
    return base(input_ids=input_ids, use_cache=False, **positions)[0]


def find_decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers in order: the one list in the base model that has as many entries as the config has layers.

    Raises `UnsupportedTarget` if there is none or more than one.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    found = [layers for layers in _outermost_lists(find_base(model)) if len(layers) == num_layers]
    if len(found) != 1:
        raise UnsupportedTarget(
            f"{type(model).__name__} must hold exactly one list of {num_layers} decoder layers, found {len(found)} such lists"
        )
    return found[0]


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Module lists that are not inside another one (experts of a layer are)."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def aux_layers(num_layers: int, wanted: Sequence[int] | None) -> tuple[int, int, int]:
    """The three layers to capture, counted from 0, read after the layer; by default `[1, L//2 - 1, L - 4]`.

    Raises `ConfigError` unless they are three distinct ids in range, as for targets too shallow for the default.
    """
    ids = tuple(wanted) if wanted is not None else (1, num_layers // 2 - 1, num_layers - 4)
    if len(ids) != 3 or len(set(ids)) != 3 or not all(0 <= layer < num_layers for layer in ids):
        origin = "got" if wanted is not None else "shallow targets must name theirs, the default would be"
        raise ConfigError(
            f"target.aux_layer_ids must be three distinct ids in [0, {num_layers}), {origin} {list(ids)}"
        )
    return ids


@contextmanager
def captured_layers(
    layers: nn.ModuleList, ids: Sequence[int], keep: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """As the model runs inside the block, `keep` gets the place in `ids` and the output [B, T, H] of each of those layers.

    The hooks go with the block, however it ends.
    """
    with ExitStack() as hooks:
        for place, layer in enumerate(ids):
            hooks.callback(layers[layer].register_forward_hook(partial(_keep_output, keep, place)).remove)
        yield


def _keep_output(
    keep: Callable[[int, Tensor], None], place: int, module: nn.Module, args: Any, output: Any
) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise UnsupportedTarget(f"decoder layer {type(module).__name__} must return hidden states [B, T, H]")
    keep(place, hidden)


class AuxStates:
    """Outputs of the captured layers side by side, written as the layers run, so that they exist once."""

    def __init__(self, batch: int, length: int, num_layers: int) -> None:
        self._shape = batch, length
        self._num_layers = num_layers
        self._states: Tensor | None = None
        self.rows = slice(0, batch)
        """Sequences of the batch that run now. What runs beyond them or beyond `length` is padding and is not kept."""

    def write(self, place: int, hidden_BTH: Tensor) -> None:
        """Keeps the output of the layer in `place`."""
        batch, length = self._shape
        width = hidden_BTH.shape[-1]
        if self._states is None:
            # Autograd may save what comes of it, which it refuses of inference tensors.
            with torch.inference_mode(False):
                self._states = hidden_BTH.new_empty(batch, length, self._num_layers * width)
        into_BTH = self._states[self.rows, :, place * width : (place + 1) * width]
        into_BTH.copy_(hidden_BTH[: into_BTH.shape[0], :length])

    @property
    def states(self) -> Tensor:
        """[B, T, 3H], once every layer has run."""
        assert self._states is not None, "no captured layer has run"
        return self._states
