"""From the `target` section of the configuration to a frozen causal language model and its tokenizer.

Weights come from safetensors only, and no code that a model ships is run.
"""

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.demo.gguf import convert_gguf, locate_gguf
from eagle_rpc.errors import ConfigError
from eagle_rpc.target.quantization import is_quantised, loading_arguments

logger = logging.getLogger(__name__)

# What a model directory needs to be loaded: no pickled weights, no code.
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


def resolve_model_dir(config: TargetConfig, cache_dir: str | Path) -> Path:
    """The local directory of `config.model`, downloaded or converted if it was not there yet.

    Raises `ConfigError` for a random target, which has none, and for a model that cannot be found.
    """
    if config.random:
        raise ConfigError("target.random describes a model without a directory, tokenizer or stored weights")
    if config.model.endswith(".gguf"):
        return convert_gguf(locate_gguf(config.model), Path(cache_dir))
    if Path(config.model).is_dir():
        return Path(config.model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.model, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"target.model must be a directory, a hub model or package/file.gguf, got {config.model}: {error}"
        ) from error


def load_target_config(config: TargetConfig, *, cache_dir: str | Path) -> PretrainedConfig:
    """The transformers configuration of the target, without its weights."""
    if not config.random:
        # Of a hub model this fetches config.json alone.
        source = resolve_model_dir(config, cache_dir) if config.model.endswith(".gguf") else config.model
        try:
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"target.model must be a model that transformers knows, got {config.model}: {error}"
            ) from error
    fields = dict(config.random)
    try:
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"target.random must name a model_type that transformers knows, got {config.random}"
        ) from error


def load_tokenizer(config: TargetConfig, *, cache_dir: str | Path) -> Any | None:
    """The target's tokenizer; None for a random target, which has none."""
    if config.random:
        return None
    return AutoTokenizer.from_pretrained(resolve_model_dir(config, cache_dir), trust_remote_code=False)


def load_model(
    config: TargetConfig, device: torch.device | str, *, cache_dir: str | Path, seed: int = 0
) -> tuple[PreTrainedModel, Any | None]:
    """The frozen model on `device`, ready for forward passes, and its tokenizer.

    A random target has the same weights in every process and on every device for equal `seed` and `config.dtype`.
    Raises `ConfigError` if the model cannot be found, is of an unknown kind, has no safetensors weights, or needs attention or
    quantisation that this machine has not got.
    """
    started = time.monotonic()
    hf_config = load_target_config(config, cache_dir=cache_dir)
    dtype = getattr(torch, config.dtype.value)
    attention = exact_attention(hf_config, config.attention)
    _check_attention(hf_config, attention, dtype)
    quantised = is_quantised(config, hf_config)
    if config.random:
        model = _random_model(hf_config, attention, seed).to(dtype)
    else:
        model = _stored_model(
            config, resolve_model_dir(config, cache_dir), attention, device, quantised=quantised
        )
    if not quantised:
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    model.config.use_cache = False
    logger.info(
        "target %s: %s, %.1f M parameters, %s%s, %s attention, on %s, loaded in %.1f s",
        "with random weights" if config.random else config.model,
        type(model).__name__,
        model.num_parameters() / 1e6,
        config.dtype.value,
        " with quantised weights" if quantised else "",
        attention,
        device,
        time.monotonic() - started,
    )
    return model, load_tokenizer(config, cache_dir=cache_dir)


def _stored_model(
    config: TargetConfig, directory: Path, attention: str, device: torch.device | str, *, quantised: bool
) -> PreTrainedModel:
    """The model of a directory, on the CPU, or on `device` where its weights are quantised."""
    dtype = getattr(torch, config.dtype.value)
    placed = loading_arguments(config, dtype, device) if quantised else {}
    try:
        return AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            **placed,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"target.model must be a causal language model with safetensors weights, got {directory}: {error}"
        ) from error
    except (ImportError, RuntimeError) as error:
        if not quantised:
            raise
        wanted = "as stored" if config.quantization is None else config.quantization.name
        raise ConfigError(
            f"target.quantization must be one that this machine runs on {device}, got {wanted}: {error}"
        ) from error


def _check_attention(hf_config: PretrainedConfig, attention: str, dtype: torch.dtype) -> None:
    """Raises `ConfigError` for an implementation that transformers does not know, has not got, or cannot give this model."""
    if attention in ("eager", "sdpa"):
        return
    try:
        # A copy without memory: the error of a large model's own loading would come late and say less.
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                copy.deepcopy(hf_config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"target.attention must be an implementation that runs {hf_config.model_type} here, got {attention}: {error}"
        ) from error


def exact_attention(hf_config: PretrainedConfig, wanted: str) -> str:
    """`wanted`, or `eager` where the model soft-caps its attention scores, which sdpa leaves out without a word."""
    if wanted == "sdpa" and caps_attention(hf_config):
        logger.info(
            "target.attention is eager: sdpa ignores the soft cap on attention scores of %s",
            hf_config.model_type,
        )
        return "eager"
    return wanted


def caps_attention(hf_config: PretrainedConfig) -> bool:
    """Whether attention scores pass through a soft cap (Gemma 2)."""
    return getattr(hf_config.get_text_config(), "attn_logit_softcapping", None) is not None


def _random_model(hf_config: PretrainedConfig, attention: str, seed: int) -> PreTrainedModel:
    # Drawn on the CPU in fp32 whatever the target's device and dtype.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            hf_config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )
