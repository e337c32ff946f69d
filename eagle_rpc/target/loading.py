"""From the `target` section of the configuration to a frozen causal language model, with its weights in place.

Weights come from safetensors only, and no code that a model ships is run.
"""

import copy
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.sizes.outline import WeightFormat
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.directory import resolve_model_dir
from eagle_rpc.target.longrope import settle_longrope
from eagle_rpc.target.model_files import load_target_config, load_tokenizer
from eagle_rpc.target.placement import Placement, StagePlacement
from eagle_rpc.target.quantization import is_quantised, stored_quantisation
from eagle_rpc.target.spread import Spread, place_tensors
from eagle_rpc.target.stage import Stage
from eagle_rpc.target.stored import auto_class, load_stored

logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A frozen model that is ready for forward passes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    spread: Spread | None  # of a model over several devices
    stage: Stage | None  # of a model of which other processes run a part


def load_model(
    config: TargetConfig, device: torch.device | str, *, cache_dir: str | Path, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The frozen model on `device`, ready for forward passes, and its tokenizer. See `load_spread`."""
    loaded = load_spread(config, [torch.device(device)], cache_dir=cache_dir, seed=seed)
    return loaded.model, loaded.tokenizer


def load_spread(
    config: TargetConfig,
    devices: Sequence[torch.device],
    *,
    cache_dir: str | Path,
    seed: int = 0,
    stage: tuple[int, int] = (0, 1),
) -> LoadedModel:
    """The frozen model over `devices`; `stage`: the part with this number, of so many that have as many devices.

    Stored weights go from their files to their GPUs; there is no copy of the whole on the host, and weights of
    other stages are not read. A random target has the same weights in every process and on every device for
    equal `seed` and `config.dtype`; a stage draws all of them and keeps its own.
    Raises `ConfigError` if the model cannot be found, is of an unknown kind or lacks weights in safetensors, or
    if this machine cannot run its attention or quantisation; for several devices also as `Placement.of`; for
    several stages as `Stage`.
    """
    started = time.monotonic()
    hf_config = load_target_config(config, cache_dir=cache_dir)
    dtype = getattr(torch, config.dtype.value)
    attention = exact_attention(hf_config, config.attention)
    _check_attention(hf_config, attention, dtype)
    quantised = is_quantised(config, hf_config)
    placed = _placed(config, hf_config, devices, stage)
    if config.random:
        model = _random_model(hf_config, attention, seed).to(dtype)
    else:
        directory = resolve_model_dir(config, cache_dir)
        # On a CPU alone weights are where transformers reads them.
        needed = placed is not None or quantised or devices[0].type != "cpu"
        device_map = {"": devices[0]} if placed is None else placed.while_loading(devices)
        model = load_stored(
            config,
            hf_config,
            directory,
            device_map if needed else {},
            attention=attention,
            quantised=quantised,
        )
    spread, own = None, None
    if placed is not None:
        spread, own = _divide(model, placed, devices, stage)
    elif not quantised:
        model = model.to(devices[0])
    model = model.eval().requires_grad_(False)
    model.config.use_cache = False
    settle_longrope(model, config.max_length or TargetShape.of(hf_config).context or 0)
    logger.info(
        "target %s: %s, %.1f M parameters, %s%s, %s attention, %s, loaded in %.1f s",
        "with random weights" if config.random else config.model,
        type(model).__name__,
        model.num_parameters() / 1e6,
        config.dtype.value,
        " with quantised weights" if quantised else "",
        attention,
        f"on {devices[0]}" if placed is None else placed.own.describe(devices),
        time.monotonic() - started,
    )
    return LoadedModel(model, load_tokenizer(config, cache_dir=cache_dir), spread, own)


def _placed(
    config: TargetConfig, hf_config: PretrainedConfig, devices: Sequence[torch.device], stage: tuple[int, int]
) -> StagePlacement | None:
    """Null: the whole model is on one device."""
    number, count = stage
    if len(devices) * count == 1:
        return None
    whole = plan_placement(config, hf_config, len(devices), count)
    return StagePlacement.of(whole, target_outline(config, hf_config), number, count)


def _divide(
    model: PreTrainedModel, placed: StagePlacement, devices: Sequence[torch.device], stage: tuple[int, int]
) -> tuple[Spread | None, Stage | None]:
    """Puts the model's tensors on their devices; the means to run it there."""
    place_tensors(model, placed.device_map(devices))
    own = None
    if placed.elsewhere:
        own = Stage(model, placed.own, placed.elsewhere, number=stage[0], count=stage[1])
    return Spread(model, placed.own, devices) if len(devices) > 1 else None, own


def plan_placement(
    config: TargetConfig, hf_config: PretrainedConfig, num_devices: int, num_stages: int = 1
) -> Placement:
    """Which parts of the target are on which of the devices of all stages, from its configuration.

    Raises as `Placement.of`.
    """
    outline, weights = target_outline(config, hf_config), weight_format(config, hf_config)
    field = "topology.devices_per_target" + (" x topology.stages_per_target" if num_stages > 1 else "")
    return Placement.of(outline, num_devices * num_stages, weights, field=field)


def target_outline(config: TargetConfig, hf_config: PretrainedConfig) -> PreTrainedModel:
    """The target without values, on the meta device."""
    with torch.device("meta"):
        return _model_of(copy.deepcopy(hf_config), getattr(torch, config.dtype.value), "eager").eval()


def weight_format(config: TargetConfig, hf_config: PretrainedConfig) -> WeightFormat:
    """Bytes of the target's weights, and the experts that a token passes."""
    experts = TargetShape.of(hf_config).experts_per_token
    return WeightFormat.of(config, stored_quantisation(hf_config), experts)


def load_with_tokenizer(
    config: TargetConfig, device: torch.device | str, *, cache_dir: str | Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_model` for jobs that need a tokenizer. Raises `ConfigError` for a random target."""
    if config.random:
        raise ConfigError("target.random has no tokenizer, which this job needs: name a stored target.model")
    model, tokenizer = load_model(config, device, cache_dir=cache_dir)
    assert tokenizer is not None, "a stored model has a tokenizer"
    return model, tokenizer


def _random_model(hf_config: PretrainedConfig, attention: str, seed: int) -> PreTrainedModel:
    # Drawn on the CPU in fp32 for every device and dtype, so that the weights are the same.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _model_of(hf_config, torch.float32, attention)


def _model_of(hf_config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    settings = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    return auto_class(hf_config).from_config(hf_config, **settings)


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
    """`wanted`, or `eager`, and says so, where sdpa is not what the model computes, or is not in it."""
    if wanted != "sdpa":
        return wanted
    if caps_attention(hf_config):
        reason = "sdpa ignores the soft cap on attention scores of"
    elif not _has_sdpa(hf_config):
        reason = "transformers has no sdpa for"
    else:
        return wanted
    logger.info("target.attention is eager: %s %s", reason, hf_config.model_type)
    return "eager"


def _has_sdpa(hf_config: PretrainedConfig) -> bool:
    """Whether the model and the text model inside it have sdpa."""
    parts = [(auto_class(hf_config), hf_config), (AutoModel, hf_config.get_text_config())]
    kinds = [auto._model_mapping.get(type(part), None) for auto, part in parts]
    return all(getattr(kind, "_supports_sdpa", True) for kind in kinds)


def caps_attention(hf_config: PretrainedConfig) -> bool:
    """Whether attention scores pass through a soft cap (Gemma 2)."""
    return getattr(hf_config.get_text_config(), "attn_logit_softcapping", None) is not None
