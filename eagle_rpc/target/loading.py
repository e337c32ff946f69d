"""From the `target` section of the configuration to a frozen causal language model and its tokenizer.

Weights come from safetensors only, and no code that a model ships is run.
"""

import copy
import logging
import time
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.target.gguf import convert_gguf, locate_gguf
from eagle_rpc.target.quantization import is_quantised, loading_arguments

logger = logging.getLogger(__name__)

# Files of a hub model that loading needs: no pickled weights, no code.
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


def resolve_model_dir(config: TargetConfig, cache_dir: str | Path) -> Path:
    """The local directory of `config.model`, downloaded or converted if it is absent.

    Raises `ConfigError` for a random target, which has no directory, and for a model that cannot be found.
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
        # For a hub model this downloads config.json only.
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


def load_tokenizer(config: TargetConfig, *, cache_dir: str | Path) -> PreTrainedTokenizerBase | None:
    """The target's tokenizer; null for a random target, which has none."""
    if config.random:
        return None
    return AutoTokenizer.from_pretrained(resolve_model_dir(config, cache_dir), trust_remote_code=False)


def load_model(
    config: TargetConfig, device: torch.device | str, *, cache_dir: str | Path, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The frozen model on `device`, ready for forward passes, and its tokenizer.

    A random target has the same weights in every process and on every device for equal `seed` and
    `config.dtype`. Raises `ConfigError` if the model cannot be found, is of an unknown kind or has no
    safetensors weights, or if this machine cannot run its attention or quantisation.
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
        directory = resolve_model_dir(config, cache_dir)
        model = _stored_model(config, directory, attention, device, quantised=quantised)
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


def load_with_tokenizer(
    config: TargetConfig, device: torch.device | str, *, cache_dir: str | Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_model` for jobs that need a tokenizer. Raises `ConfigError` for a random target."""
    if config.random:
        raise ConfigError("target.random has no tokenizer, which this job needs: name a stored target.model")
    model, tokenizer = load_model(config, device, cache_dir=cache_dir)
    assert tokenizer is not None, "a stored model has a tokenizer"
    return model, tokenizer


def _stored_model(
    config: TargetConfig, directory: Path, attention: str, device: torch.device | str, *, quantised: bool
) -> PreTrainedModel:
    """The model of a directory: on the CPU, or on `device` if its weights are quantised."""
    dtype = getattr(torch, config.dtype.value)
    placed = loading_arguments(config, dtype, device) if quantised else {}
    exact = {"dtype": dtype, "attn_implementation": attention}
    safe = {"use_safetensors": True, "trust_remote_code": False}
    try:
        return AutoModelForCausalLM.from_pretrained(directory, **exact, **safe, **placed)
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


def _random_model(hf_config: PretrainedConfig, attention: str, seed: int) -> PreTrainedModel:
    # Drawn on the CPU in fp32 for every device and dtype, so that the weights are the same.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _model_of(hf_config, torch.float32, attention)


def _model_of(hf_config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    settings = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    return AutoModelForCausalLM.from_config(hf_config, **settings)


def _check_attention(hf_config: PretrainedConfig, attention: str, dtype: torch.dtype) -> None:
    """Raises `ConfigError` for an implementation that is unknown, not installed, or not for this model."""
    if attention in ("eager", "sdpa"):
        return
    try:
        # A copy without memory: a large model would load for minutes before its error, which says less.
        with torch.device("meta"):
            _model_of(copy.deepcopy(hf_config), dtype, attention)
    except (ImportError, OSError, ValueError) as error:
        rule = f"target.attention must be an implementation that runs {hf_config.model_type} here"
        raise ConfigError(f"{rule}, got {attention}: {error}") from error


def exact_attention(hf_config: PretrainedConfig, wanted: str) -> str:
    """`wanted`, or `eager` where the model soft-caps its attention scores, which sdpa silently omits."""
    if wanted != "sdpa" or not caps_attention(hf_config):
        return wanted
    model_type = hf_config.model_type
    logger.info("target.attention is eager: sdpa ignores the soft cap on attention scores of %s", model_type)
    return "eager"


def caps_attention(hf_config: PretrainedConfig) -> bool:
    """Whether attention scores pass through a soft cap (Gemma 2)."""
    return getattr(hf_config.get_text_config(), "attn_logit_softcapping", None) is not None
