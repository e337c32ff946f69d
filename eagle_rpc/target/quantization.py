"""Quantised weights, by transformers' own means. Head and embedding keep the target's dtype."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, TorchAoConfig

from eagle_rpc.config.choices import Quantization
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError

# Compute capability of the first GPUs that multiply fp8.
_FP8_CAPABILITY = (8, 9)
# torchao's own settings make inductor try kernels for minutes, and change fp32 products in the whole process.
_OWN_INDUCTOR = {"set_inductor_config": False}


def is_quantised(config: TargetConfig, hf_config: PretrainedConfig) -> bool:
    """Whether the weights are quantised: while they are loaded, or as they are stored.

    Raises `ConfigError` if `target.quantization` is set for a model that cannot be quantised.
    """
    stored = getattr(hf_config, "quantization_config", None) is not None
    if config.quantization is not None and (config.random or stored):
        kind = "a random model" if config.random else "a model whose weights are stored quantised"
        raise ConfigError(f"target.quantization must be null for {kind}, got {config.quantization.name}")
    return stored or config.quantization is not None


def stored_quantisation(hf_config: PretrainedConfig) -> Mapping[str, Any] | None:
    """How the weights of a model are stored; null: not quantised."""
    stored = getattr(hf_config, "quantization_config", None)
    return stored if stored is None or isinstance(stored, Mapping) else stored.to_dict()


def loading_arguments(config: TargetConfig, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise weights while they are loaded to devices like `device`.

    Raises `ConfigError` if a package is missing or the device cannot run them.
    """
    device = torch.device(device)
    wanted = config.quantization
    if wanted is None:
        return {}
    try:
        quantised = {"quantization_config": _quantisation(wanted, dtype)}
    except ImportError as error:
        raise ConfigError(f"target.quantization={wanted.name} must find its package: {error}") from error
    if wanted is Quantization.fp8 and not _multiplies_fp8(device):
        rule = f"target.quantization must be one that this machine runs on {device}"
        needed = ".".join(map(str, _FP8_CAPABILITY))
        raise ConfigError(f"{rule}, got fp8, which needs a GPU of compute capability {needed} or later")
    return quantised


def _quantisation(wanted: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig:
    if wanted is Quantization.nf4:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if wanted is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao import quantization

    if wanted is Quantization.int8_weights:
        return TorchAoConfig(quantization.Int8WeightOnlyConfig(**_OWN_INDUCTOR))
    by_row = {"granularity": quantization.PerRow(), **_OWN_INDUCTOR}
    return TorchAoConfig(quantization.Float8DynamicActivationFloat8WeightConfig(**by_row))


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
