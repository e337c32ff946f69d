"""`config.json` of the plain EAGLE-3 form: the keys that serving engines read of a draft, both ways.

`docs/drafts.md` says which engine reads which key.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from eagle_rpc.draft import Eagle3DraftConfig
from eagle_rpc.draft.rope import rotary_embedding
from eagle_rpc.errors import CheckpointError, ConfigError

ARCHITECTURE = "LlamaForCausalLMEagle3"
AUX_LAYERS, _NUM_AUX_LAYERS = "eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states"
_DEFAULT_NUM_AUX_LAYERS = 3
_SLIDING = "sliding_attention"
# Left out if they are off, so that the config of a plain EAGLE-3 draft has no key of EAGLE-3.1.
_SWITCHES = ("norm_before_fc", "fc_norm", "norm_output")
_ABSENT_IF_NULL = ("rope_scaling", "rope_length", "sliding_window")


def plain_config(
    draft_config: Eagle3DraftConfig, *, dtype: torch.dtype, aux_layer_ids: Sequence[int]
) -> dict[str, Any]:
    """The keys of a draft. `aux_layer_ids` are counted after the layer."""
    config: dict[str, Any] = {field.name: getattr(draft_config, field.name) for field in fields(draft_config)}
    config["rope_scaling"] = _rope_for_engines(draft_config)
    for name in (*_SWITCHES, *_ABSENT_IF_NULL):
        if config[name] is None or config[name] is False:
            del config[name]
    num_layers, num_aux_layers = config.pop("num_layers"), config.pop("num_aux_layers")
    if draft_config.sliding_window is not None:
        config["layer_types"] = [_SLIDING] * num_layers
    if num_aux_layers != _DEFAULT_NUM_AUX_LAYERS:
        config[_NUM_AUX_LAYERS] = num_aux_layers
    # vLLM reads the outer ids and counts before the layer; SGLang reads the inner ones and adds 1.
    inner = {AUX_LAYERS: list(aux_layer_ids), "use_aux_hidden_state": True}
    if draft_config.norm_before_fc:
        # TensorRT-LLM looks for it here alone.
        inner["norm_before_fc"] = True
    return config | {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": num_layers,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        AUX_LAYERS: [layer + 1 for layer in aux_layer_ids],
        "eagle_config": inner,
    }


def read_plain_config(raw: dict[str, Any], path: Path) -> tuple[Eagle3DraftConfig, tuple[int, ...] | None]:
    """The draft, and its captured layers counted after the layer; null: the target's default layers.

    Raises `CheckpointError` that names `path`, rule and value.
    """
    required = {"architectures": [ARCHITECTURE], "tie_word_embeddings": False}
    if raw.get("sliding_window") is not None:
        # Without the kinds of the layers vLLM serves full attention.
        required["layer_types"] = [_SLIDING] * raw.get("num_hidden_layers", 1)
    for name, value in required.items():
        if raw.get(name) != value:
            raise CheckpointError(f"{path}: {name} must be {value}, got {raw.get(name)}")
    aux_layer_ids = _read_aux_layers(raw, path)
    of_ids = _DEFAULT_NUM_AUX_LAYERS if aux_layer_ids is None else len(aux_layer_ids)
    num_aux_layers = raw.get(_NUM_AUX_LAYERS) or of_ids
    if num_aux_layers != of_ids:
        named = "three default ones" if aux_layer_ids is None else str(list(aux_layer_ids))
        raise CheckpointError(
            f"{path}: {_NUM_AUX_LAYERS} must be the number of the captured layers, {named}, got {num_aux_layers}"
        )
    # As vLLM, which takes this one from either place.
    raw = {"norm_before_fc": (raw.get("eagle_config") or {}).get("norm_before_fc", False), **raw}
    known = {field.name: raw[field.name] for field in fields(Eagle3DraftConfig) if field.name in raw}
    known |= {"num_aux_layers": num_aux_layers, "num_layers": raw.get("num_hidden_layers", 1)}
    try:
        config = Eagle3DraftConfig(**{"rope_scaling": None, **known})
        rotary_embedding(config)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} must describe an EAGLE-3 draft: {error}") from error
    return config, aux_layer_ids


def _rope_for_engines(draft_config: Eagle3DraftConfig) -> dict[str, Any] | None:
    """The draft's `rope_scaling`; of YaRN with the attention factor as vLLM and SGLang read it.

    They multiply `attn_factor` by `0.1 ln(factor) + 1` and know neither `attention_factor` nor `mscale`.
    """
    scaling = draft_config.rope_scaling
    if scaling is None or scaling["rope_type"] != "yarn" or not scaling.get("factor"):
        return scaling
    usual = 0.1 * math.log(max(scaling["factor"], 1.0)) + 1
    return {**scaling, "attn_factor": rotary_embedding(draft_config).factor / usual}


def _read_aux_layers(raw: dict[str, Any], path: Path) -> tuple[int, ...] | None:
    before_layer = raw.get(AUX_LAYERS)
    after_layer = (raw.get("eagle_config") or {}).get(AUX_LAYERS)
    if before_layer is None:
        return None if after_layer is None else tuple(after_layer)
    aux_layer_ids = tuple(layer - 1 for layer in before_layer)
    if after_layer is not None and tuple(after_layer) != aux_layer_ids:
        raise CheckpointError(
            f"{path}: eagle_config.{AUX_LAYERS} must be one less than {before_layer}, got {after_layer}"
        )
    return aux_layer_ids
