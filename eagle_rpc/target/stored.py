"""A model from the safetensors of a directory: whole, or refused by the names of what it lacks."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    core_model_loading,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError, in_one_line
from eagle_rpc.target.quantization import loading_arguments

logger = logging.getLogger(__name__)

# Tensors that an error or the log names.
_NAMED = 3
# Parts of names of modules that text does not pass: other modalities, and layers that predict several tokens.
_BESIDE_TEXT = ("visual", "vision", "image", "audio", "speech", "mtp", "nextn", "connector", "projector")


def continues_text(hf_config: PretrainedConfig) -> bool:
    """Whether transformers has a language model of this type, alone or beside a vision tower."""
    known = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return any(hf_config.model_type in types for types in known)


def auto_class(hf_config: PretrainedConfig) -> Any:
    """The class of transformers that builds the language model of this type."""
    alone = hf_config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if alone else AutoModelForImageTextToText


def load_stored(
    config: TargetConfig,
    hf_config: PretrainedConfig,
    directory: Path,
    device_map: dict[str, torch.device],
    *,
    attention: str,
    quantised: bool,
) -> PreTrainedModel:
    """The model of a directory, each weight read from its file onto its device; without a map on the CPU.

    Raises `ConfigError` if weights are damaged, of another format, missing or of other shapes, and if this
    machine cannot run their quantisation.
    """
    dtype = getattr(torch, config.dtype.value)
    placed: dict[str, Any] = {"device_map": device_map} if device_map else {}
    real = (device for device in device_map.values() if device.type != "meta")
    device = next(real, torch.device("cpu"))
    if quantised:
        placed |= loading_arguments(config, dtype, device)
    exact = {"dtype": dtype, "attn_implementation": attention}
    safe = {"use_safetensors": True, "trust_remote_code": False}
    # Tensors of other shapes are refused below, by their names.
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    _require_whole_files(directory)
    try:
        with _unread_on_meta():
            loaded = auto_class(hf_config).from_pretrained(directory, **exact, **safe, **placed, **told)
    except (OSError, ValueError) as error:
        rule = "target.model must be a causal language model with safetensors weights"
        raise ConfigError(f"{rule}, got {directory}: {in_one_line(error)}") from error
    except (ImportError, RuntimeError) as error:
        if not quantised:
            raise
        wanted = "as stored" if config.quantization is None else config.quantization.name
        raise ConfigError(
            f"target.quantization must be one that this machine runs on {device}, got {wanted}: {error}"
        ) from error
    model: PreTrainedModel = loaded[0]
    remove_device_hooks(model)
    _require_all_tensors(model, loaded[1], directory)
    return model


@contextmanager
def _unread_on_meta() -> Iterator[None]:
    """In the block transformers does not read tensors that it puts on the meta device, whose values nobody needs."""
    read = getattr(core_model_loading, "_materialize_copy", None)
    if read is None:
        # Of another version: it reads them all.
        yield
        return

    def materialize(tensor: Any, device: Any = None, dtype: Any = None) -> Tensor:
        if device is None or torch.device(device).type != "meta" or dtype is None:
            copy: Tensor = read(tensor, device, dtype)
            return copy
        shape = tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape()
        return torch.empty(shape, dtype=dtype, device="meta")

    with mock.patch.object(core_model_loading, "_materialize_copy", materialize):
        yield


def remove_device_hooks(model: PreTrainedModel) -> None:
    """Takes off what transformers puts around modules on several devices: its copies make devices wait."""
    if len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        return
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for module in model.modules():
        vars(module).pop("forward", None)


def _require_whole_files(directory: Path) -> None:
    """Raises `ConfigError` naming a weight file that is cut or of another format; reads their heads only."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ConfigError(
                f"target.model must hold whole safetensors files, got {file} of {file.stat().st_size} bytes: "
                f"{in_one_line(error)}"
            ) from error


def _require_all_tensors(model: PreTrainedModel, report: dict[str, Any], directory: Path) -> None:
    """Raises `ConfigError` for tensors that transformers had to draw at random; logs those that it ignored."""
    name = type(model).__name__
    rule = f"target.model must hold every tensor of {name} in its shape, got {directory}"
    if missing := report["missing_keys"]:
        raise ConfigError(f"{rule}, which lacks {_first(missing)}")
    if mismatched := report["mismatched_keys"]:
        found = (f"{key} of shape {list(stored)} for {list(own)}" for key, stored, own in mismatched)
        raise ConfigError(f"{rule}, which has {_first(found)}")
    if report["error_msgs"]:
        raise ConfigError(f"{rule}: {'; '.join(report['error_msgs'])}")
    unknown = [key for key in report["unexpected_keys"] if not any(part in key for part in _BESIDE_TEXT)]
    if unknown:
        logger.warning("%s has no place for %s, which its weights hold", name, _first(unknown))


def _first(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - _NAMED
    return ", ".join(ordered[:_NAMED]) + (f" and {more} more" if more > 0 else "")
