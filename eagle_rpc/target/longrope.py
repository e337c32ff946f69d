"""Rotary embeddings of kind `longrope`, with factors that do not depend on the batch.

transformers takes the long factors for every sequence of a batch whose longest one exceeds the context of the
first training. So a chat would change its neighbours. Here, as in vLLM, the configuration decides.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eagle_rpc.errors import UnsupportedTarget

_KIND = "longrope"


def settle_longrope(model: PreTrainedModel, length: int) -> None:
    """Sets the factors for sequences of up to `length` tokens, for all sequences.

    Raises `UnsupportedTarget` for a module that still looks at the batch.
    """
    for module in model.modules():
        for layer_type in _kinds(module):
            _settle(module, layer_type, length)
            _check(module, layer_type)


def _kinds(module: nn.Module) -> Iterator[str | None]:
    """The kinds of layers that a rotary module serves by `longrope`; null: all of them."""
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, dict):
        yield from (layer_type for layer_type, kind in rope_type.items() if kind == _KIND)
    elif rope_type == _KIND:
        yield None


def _settle(module: nn.Module, layer_type: str | None, length: int) -> None:
    prefix = "" if layer_type is None else f"{layer_type}_"
    config: Any = module.config
    device = getattr(module, f"{prefix}inv_freq").device
    frequencies, _ = ROPE_INIT_FUNCTIONS[_KIND](config, device, seq_len=length, layer_type=layer_type)
    # What transformers chooses from, and its present choice.
    for name in ("original_inv_freq", "long_inv_freq", "inv_freq"):
        setattr(module, f"{prefix}{name}", frequencies.clone())


def _check(module: nn.Module, layer_type: str | None) -> None:
    config: Any = module.config
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    device = next(itertools.chain(module.buffers(), [torch.empty(0)])).device
    states = torch.zeros(1, 1, 1, device=device)
    further = {} if layer_type is None else {"layer_type": layer_type}

    def tables(last: int) -> Tensor:
        positions_1T = torch.tensor([[1, 2, last]], device=device)
        return torch.stack(module(states, positions_1T, **further))[..., :2, :]

    if not torch.equal(tables(3), tables(parameters["original_max_position_embeddings"] + 1)):
        name = type(module).__name__
        raise UnsupportedTarget(f"{name} must rotate a chat alike beside any other, its longrope does not")
