"""The names of a draft's tensors in an export, both ways.

One layer is `midlayer.*` without a `model.` prefix: older SGLang skips unknown names and serves random weights. Of
several layers all are `layers.N.*`, since TensorRT-LLM knows no `midlayer` then. The norm before the attention of
a further layer is `input_layernorm` in vLLM and `hidden_norm` in SGLang and TensorRT-LLM, so it has both names.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from eagle_rpc.errors import CheckpointError

_FIRST_LAYER, _FIRST_OF_SEVERAL = "midlayer.", "layers.0."
_FURTHER_NORM = re.compile(r"(layers\.[1-9]\d*)\.input_layernorm\.weight")


def exported_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a draft under their names in the plain form."""
    further_norms = {name: match for name in tensors if (match := _FURTHER_NORM.fullmatch(name))}
    if not further_norms:
        return dict(tensors)
    return speculators_names(tensors) | {
        _second_name(match): tensors[name].clone() for name, match in further_norms.items()
    }


def speculators_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the plain form under their names in that of speculators."""
    return {name.replace(_FIRST_LAYER, _FIRST_OF_SEVERAL): tensor for name, tensor in tensors.items()}


def draft_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of the export in `path`, of either form, under their names in a draft; a prefix `model.` is left out.

    Raises `CheckpointError` if the two names of one norm have different values.
    """
    named = {
        name.removeprefix("model.").replace(_FIRST_OF_SEVERAL, _FIRST_LAYER): tensor
        for name, tensor in tensors.items()
    }
    for name in list(named):
        if match := _FURTHER_NORM.fullmatch(name):
            second = named.pop(_second_name(match), None)
            if second is not None and not torch.equal(second, named[name]):
                raise CheckpointError(
                    f"{path}: {name} and {_second_name(match)} must be equal: engines read one or the other"
                )
    return named


def _second_name(match: re.Match[str]) -> str:
    return f"{match[1]}.hidden_norm.weight"
