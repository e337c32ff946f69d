"""The parts of a stored model before and behind its decoder: token embedding and head, without the layers.

They serve where something else than transformers runs the layers.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.supervision import tensors_digest
from eagle_rpc.target.capture import find_decoder
from eagle_rpc.target.loading import target_outline


class StoredTensors:
    """The tensors of a directory's safetensors by name, each read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._files = {}
        with ExitStack() as opened:
            for file in sorted(directory.glob("*.safetensors")):
                tensors = opened.enter_context(safe_open(file, framework="pt"))
                self._files.update(dict.fromkeys(tensors.keys(), file))
        if not self._files:
            raise ConfigError(f"target.model must hold safetensors, got {directory}")

    def find(self, name: str) -> str | None:
        """The stored name of a weight of the model: the same, or the only one with the same last two parts.

        The models inside others are stored with prefixes that differ from those of transformers' classes.
        """
        if name in self._files:
            return name
        tail = ".".join(name.split(".")[-2:])
        alike = [stored for stored in self._files if f".{stored}".endswith(f".{tail}")]
        return alike[0] if len(alike) == 1 else None

    def read(self, stored_name: str) -> Tensor:
        with safe_open(self._files[stored_name], framework="pt") as file:
            return file.get_tensor(stored_name)

    def fingerprint(self) -> str:
        """Hash of names, shapes, dtypes and the first row of every tensor."""
        return tensors_digest(self._first_rows())[:16]

    def _first_rows(self) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self._files):
            with safe_open(self._files[name], framework="pt") as file:
                part = file.get_slice(name)
                shape = part.get_shape()
                yield f"{name} {shape}", part[:1] if shape else file.get_tensor(name)


def load_beside_decoder(
    config: TargetConfig, hf_config: PretrainedConfig, stored: StoredTensors, device: torch.device
) -> PreTrainedModel:
    """The model on the meta device, with values for its token embedding and its head alone, on `device`.

    Raises `ConfigError` for a weight of them that is not stored under a name of its own, or in another shape.
    """
    model = target_outline(config, hf_config)
    for module, name in _weights_beside_decoder(model):
        weight: nn.Parameter = getattr(module, name.rpartition(".")[2])
        if not weight.is_meta:
            continue  # tied to one that has been read
        value = _value_of(stored, name, weight)
        filled = nn.Parameter(value.to(device, weight.dtype), requires_grad=False)
        for other in model.modules():
            for own, parameter in list(other._parameters.items()):
                if parameter is weight:
                    other._parameters[own] = filled
    return model.eval()


def _weights_beside_decoder(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    """Modules and full names of the weights of the token embedding, and of what is behind the base."""
    decoder, embedding = find_decoder(model), model.get_input_embeddings()
    behind = [child for child in model.children() if not any(part is decoder for part in child.modules())]
    wanted = {id(module) for part in (embedding, *behind) for module in part.modules()}
    for path, module in model.named_modules():
        if id(module) in wanted:
            for name, _ in module.named_parameters(recurse=False):
                yield module, f"{path}.{name}"


def _value_of(stored: StoredTensors, name: str, weight: nn.Parameter) -> Tensor:
    found = stored.find(name)
    if found is None:
        raise ConfigError(f"target.model must hold {name} for target.engine=vllm, got no tensor of that name")
    value = stored.read(found)
    if value.shape != weight.shape or not value.is_floating_point():
        raise ConfigError(
            f"target.model must hold {name} as {list(weight.shape)} for target.engine=vllm, "
            f"got {list(value.shape)} of {value.dtype}"
        )
    return value
