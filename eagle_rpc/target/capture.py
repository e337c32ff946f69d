"""Running a model without its head, and reading its decoder layers while it runs.

Legend: B batch, T sequence, H target hidden, W width of all captured states side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from eagle_rpc.errors import UnsupportedTarget


def find_base(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head: the submodule that holds the text decoder, and in some models a vision tower.

    Raises `UnsupportedTarget` if there is none or more than one.
    """
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    if (decoder := _named_decoder(model)) is not None:
        parts = [part for part in parts if any(inner is decoder for inner in part.modules())]
    if len(parts) != 1:
        raise UnsupportedTarget(
            f"{type(model).__name__} must hold one decoder beside its head, found {len(parts)}"
        )
    return parts[0]


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The text model: the base, or the part of it that transformers calls the decoder."""
    return _named_decoder(model) or find_base(model)


def _named_decoder(model: PreTrainedModel) -> PreTrainedModel | None:
    decoder = model.get_decoder()
    # Some models return themselves, or a layer that happens to have the name.
    return decoder if isinstance(decoder, PreTrainedModel) and decoder is not model else None


def run_base(base: PreTrainedModel, input_ids: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """Last hidden states [B, T, H] of [B, T] ids, padded on the right.

    There is no mask for padding: causal attention does not see padding on the right. Where positions restart
    within a row, another chat begins; chats do not see each other.
    """
    positions = {} if positions_BT is None else {"position_ids": positions_BT}
    return run_base_whole(base, input_ids, **positions)[0]


def run_base_whole(base: PreTrainedModel, input_ids: Tensor, **more: Tensor) -> ModelOutput:
    """The output of `run_base` in the model's own class."""
    return base(input_ids=input_ids, use_cache=False, return_dict=True, **more)


def find_decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers in order: the list of the modules whose outputs transformers calls hidden states.

    For models that do not say so, the only list as long as the config says. A vision tower beside the text
    decoder is not searched. Raises `UnsupportedTarget` if there is no such list or more than one.
    """
    decoder = find_decoder(model)
    lists = list(_outermost_lists(decoder))
    kinds = _kinds_of_layers(decoder)
    found = [layers for layers in lists if kinds and all(isinstance(layer, kinds) for layer in layers)]
    if not found:
        num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        found = [layers for layers in lists if len(layers) == num_layers]
    if len(found) != 1:
        rule = f"{type(model).__name__} must hold exactly one list of decoder layers"
        raise UnsupportedTarget(f"{rule}, found {len(found)}")
    return found[0]


def _kinds_of_layers(decoder: PreTrainedModel) -> tuple[type[nn.Module], ...]:
    """The classes whose outputs transformers records as hidden states; empty where it records none."""
    recorded: Any = (getattr(decoder, "_can_record_outputs", None) or {}).get("hidden_states", ())
    recorders: Any = recorded if isinstance(recorded, (list, tuple)) else (recorded,)
    return tuple(getattr(recorder, "target_class", recorder) for recorder in recorders)


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Module lists outside of other lists: the experts of a layer are inside one."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


@contextmanager
def captured_layers(
    layers: nn.ModuleList, ids: Sequence[int], keep: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """While the model runs in the block, calls `keep(index, output [B, T, H])` for the layer `ids[index]`.

    The hooks are removed at the end of the block, also after an exception.
    """
    with ExitStack() as hooks:
        for index, layer in enumerate(ids):
            hooks.callback(layers[layer].register_forward_hook(partial(_keep_output, keep, index)).remove)
        yield


def check_capture(
    base: PreTrainedModel, layers: nn.ModuleList, ids: Sequence[int], ids_BT: Tensor
) -> ModelOutput:
    """The output of a pass in which each of the layers `ids` runs once; last hidden states [B, T, H] come first.

    Raises `UnsupportedTarget` for a layer that does not run, runs again, or has outputs of another shape.
    """
    shapes: list[tuple[int, torch.Size]] = []
    with captured_layers(
        layers, ids, lambda index, output_BTH: shapes.append((ids[index], output_BTH.shape))
    ):
        output = run_base_whole(base, ids_BT)
    ran = [layer for layer, _ in shapes]
    if sorted(ran) != sorted(ids):
        rule = f"each layer of target.aux_layer_ids {list(ids)} must run once in a pass"
        raise UnsupportedTarget(f"{rule}, {type(base).__name__} runs {ran}")
    for layer, shape in shapes:
        if shape != output[0].shape:
            rule = f"layer {layer} of {type(base).__name__} must return hidden states {list(output[0].shape)}"
            raise UnsupportedTarget(f"{rule}, got {list(shape)}")
    return output


def _keep_output(
    keep: Callable[[int, Tensor], None], index: int, module: nn.Module, args: Any, output: Any
) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise UnsupportedTarget(f"decoder layer {type(module).__name__} must return hidden states [B, T, H]")
    keep(index, hidden)


class AuxStates:
    """Outputs of the captured layers side by side, each written when its layer runs, so it exists once."""

    def __init__(
        self, shape_BT: Sequence[int], num_layers: int, bring: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """`bring`: outputs to the device of the states, if the layers are on several."""
        self._batch, self._length = shape_BT
        self._num_layers = num_layers
        self._bring = bring
        self._states: Tensor | None = None
        self._missing = set(range(num_layers))
        self.rows = slice(0, self._batch)
        """Sequences of the batch that run now. Outputs beyond them, or beyond T, are padding: dropped."""

    def write(self, index: int, hidden_BTH: Tensor) -> None:
        """Keeps the output of captured layer number `index`."""
        width = hidden_BTH.shape[-1]
        if self._bring is not None:
            hidden_BTH = self._bring(hidden_BTH)
        if self._states is None:
            # No inference tensor: autograd may have to save views of it, which it refuses for those.
            with torch.inference_mode(False):
                self._states = hidden_BTH.new_empty(self._batch, self._length, self._num_layers * width)
        into_BTH = self._states[self.rows, :, index * width : (index + 1) * width]
        into_BTH.copy_(hidden_BTH[: into_BTH.shape[0], : self._length])
        self._missing.discard(index)

    @property
    def states(self) -> Tensor:
        """[B, T, W]. Raises `UnsupportedTarget` if a layer did not run: its part is memory that nobody wrote."""
        if self._states is None or self._missing:
            rule = f"all {self._num_layers} captured layers must run in every pass"
            raise UnsupportedTarget(f"{rule}, missing are numbers {sorted(self._missing)} of them")
        return self._states
