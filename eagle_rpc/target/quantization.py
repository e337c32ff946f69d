"""Quantised weights, as transformers offers them. The head and the embedding keep the target's dtype."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, TorchAoConfig

from eagle_rpc.config.choices import Quantization
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError

# Of the first GPUs that multiply fp8.
_FP8_CAPABILITY = (8, 9)
# torchao's settings would make inductor try kernels for minutes, and change how the whole process multiplies fp32.
_OWN_INDUCTOR = {"set_inductor_config": False}


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _int8(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


def _int8_weights(dtype: torch.dtype) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(**_OWN_INDUCTOR))


def _fp8(dtype: torch.dtype) -> TorchAoConfig:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), **_OWN_INDUCTOR))


_CONFIGS: dict[Quantization, Callable[[torch.dtype], Any]] = {
    Quantization.fp8: _fp8,
    Quantization.int8: _int8,
    Quantization.int8_weights: _int8_weights,
    Quantization.nf4: _nf4,
}


def is_quantised(config: TargetConfig, hf_config: PretrainedConfig) -> bool:
    """Whether the weights will be quantised: when they are loaded, or as they are stored.

    Raises `ConfigError` if `target.quantization` asks for what cannot be quantised.
    """
    stored = getattr(hf_config, "quantization_config", None) is not None
    if config.quantization is not None and (config.random or stored):
        what = "a random one" if config.random else "one whose weights are stored quantised"
        raise ConfigError(f"target.quantization must be null for {what}, got {config.quantization.name}")
    return stored or config.quantization is not None


def loading_arguments(config: TargetConfig, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """What `from_pretrained` needs to load quantised weights to where they stay: they do not move afterwards.

    Raises `ConfigError` if a package is missing, or a GPU that can.
    """
    device = torch.device(device)
    placed = {"device_map": {"": device}}
    if config.quantization is None:
        return placed
    try:
        quantised = {**placed, "quantization_config": _CONFIGS[config.quantization](dtype)}
    except ImportError as error:
        raise ConfigError(
            f"target.quantization={config.quantization.name} must find its package: {error}"
        ) from error
    if config.quantization is Quantization.fp8 and not _multiplies_fp8(device):
        raise ConfigError(
            f"target.quantization must be one that this machine runs on {device}, got fp8, which takes a GPU of compute capability "
            f"{'.'.join(map(str, _FP8_CAPABILITY))} or later"
        )
    return quantised


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
