"""The plain EAGLE-3 directory that vLLM and SGLang serve: `config.json` and `model.safetensors`.

Each engine has its own traps, so names and keys are the ones that every version of both reads: `midlayer.*` without a
`model.` prefix (older SGLang skips what it does not know, and serves random weights), one layer, an untied head, rotary
settings written out, and `d2t` as offsets.
Legend: H hidden, I feed-forward width, A width of all query heads, E width of all key heads, V target vocab, K draft vocab.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle_rpc.draft.config import Eagle3DraftConfig
from eagle_rpc.errors import CheckpointError, ConfigError, InvalidRequest
from eagle_rpc.supervision import VocabMapping

ARCHITECTURE = "LlamaForCausalLMEagle3"
EMBEDDING = "embed_tokens.weight"
_CONFIG_FILE, _WEIGHTS_FILE = "config.json", "model.safetensors"
_AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedDraft:
    """An export as read back."""

    config: Eagle3DraftConfig
    weights: dict[str, Tensor]  # of `weight_shapes`, in the dtype they were exported in
    mapping: VocabMapping
    aux_layer_ids: tuple[int, ...] | None  # counted after the layer; null: the target's default layers


def export_draft(
    weights: Mapping[str, Tensor],
    draft_config: Eagle3DraftConfig,
    mapping: VocabMapping,
    output_dir: Path,
    *,
    dtype: torch.dtype,
    aux_layer_ids: Sequence[int],
    num_target_layers: int,
    target_embedding: Tensor,
    bos_token_id: int | None,
    eos_token_id: int | list[int] | None,
) -> list[Path]:
    """Writes the plain form to `output_dir` and returns the files; an export that is there already is replaced.

    Args:
        weights: the draft's parameters by name (`weight_shapes`); its embedding may be missing.
        dtype: format of the exported weights.
        aux_layer_ids: decoder layers whose outputs the draft reads, counted after the layer.
        target_embedding: [V, H], exported as the draft's.

    Raises:
        CheckpointError: a weight is missing, unknown, or of another shape than the config says.
        ConfigError: mapping and config disagree, the layers do not ascend, or `output_dir` holds something else.
    """
    if list(aux_layer_ids) != sorted(aux_layer_ids):
        raise ConfigError(
            f"target.aux_layer_ids must ascend: serving engines join hidden states in layer order, got {list(aux_layer_ids)}"
        )
    tensors = {name: weight for name, weight in weights.items() if name != EMBEDDING} | {
        EMBEDDING: target_embedding
    }
    _check_shapes(tensors, draft_config)
    if (len(mapping), mapping.target_vocab_size) != (draft_config.draft_vocab_size, draft_config.vocab_size):
        raise ConfigError(
            f"the vocab mapping must hold {draft_config.draft_vocab_size} of {draft_config.vocab_size} tokens "
            f"as the draft's config says, got {len(mapping)} of {mapping.target_vocab_size}"
        )
    stored = {
        name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in tensors.items()
    }
    if (
        len(mapping) < mapping.target_vocab_size
    ):  # engines take a missing map as the identity, and vLLM refuses an identity map
        stored |= {"d2t": mapping.d2t, "t2d": mapping.t2d}
    config = _serving_config(draft_config, dtype, aux_layer_ids, num_target_layers) | {
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
    }
    return _replace_directory(output_dir, config, stored)


def weight_shapes(config: Eagle3DraftConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every floating point tensor of an export."""
    H, I = config.hidden_size, config.intermediate_size  # noqa: E741
    A, E = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "fc.weight": (H, 3 * H),
        "midlayer.hidden_norm.weight": (H,),
        "midlayer.input_layernorm.weight": (H,),
        "midlayer.post_attention_layernorm.weight": (H,),
        "midlayer.self_attn.q_proj.weight": (A, 2 * H),
        "midlayer.self_attn.k_proj.weight": (E, 2 * H),
        "midlayer.self_attn.v_proj.weight": (E, 2 * H),
        "midlayer.self_attn.o_proj.weight": (H, A),
        "midlayer.mlp.gate_proj.weight": (I, H),
        "midlayer.mlp.up_proj.weight": (I, H),
        "midlayer.mlp.down_proj.weight": (H, I),
        "norm.weight": (H,),
        "lm_head.weight": (config.draft_vocab_size, H),
        EMBEDDING: (config.vocab_size, H),
    }


def load_export(directory: Path) -> ExportedDraft:
    """Reads what `export_draft` wrote. Raises `CheckpointError` naming the file, the rule and the value."""
    raw = _read_config(directory / _CONFIG_FILE)
    known = {field.name for field in fields(Eagle3DraftConfig)}
    try:
        config = Eagle3DraftConfig(
            **{"rope_scaling": None, **{name: value for name, value in raw.items() if name in known}}
        )
    except (TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{directory / _CONFIG_FILE} must describe an EAGLE-3 draft: {error}"
        ) from error
    try:
        tensors = load_file(directory / _WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / _WEIGHTS_FILE} must be a safetensors file: {error}") from error
    offsets = tensors.pop("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
    membership = tensors.pop("t2d", None)
    _check_shapes(tensors, config)
    try:
        mapping = VocabMapping.from_token_ids(offsets + torch.arange(len(offsets)), config.vocab_size)
    except InvalidRequest as error:
        raise CheckpointError(
            f"{directory / _WEIGHTS_FILE}: d2t must hold offsets to distinct target ids: {error}"
        ) from error
    if len(mapping) != config.draft_vocab_size or (
        membership is not None and not torch.equal(membership, mapping.t2d)
    ):
        raise CheckpointError(
            f"{directory / _WEIGHTS_FILE}: d2t and t2d must name the same {config.draft_vocab_size} tokens"
        )
    return ExportedDraft(
        config=config, weights=tensors, mapping=mapping, aux_layer_ids=_read_aux_layers(raw, directory)
    )


def _serving_config(
    draft_config: Eagle3DraftConfig, dtype: torch.dtype, aux_layer_ids: Sequence[int], num_target_layers: int
) -> dict[str, Any]:
    config: dict[str, Any] = {field.name: getattr(draft_config, field.name) for field in fields(draft_config)}
    if draft_config.rope_scaling is None:
        del config["rope_scaling"]
    config |= {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    default_layers = [1, num_target_layers // 2 - 1, num_target_layers - 4]
    if list(aux_layer_ids) != default_layers:
        # vLLM reads the outer key and counts before the layer; SGLang reads the inner one and adds one to it.
        config[_AUX_LAYERS] = [layer + 1 for layer in aux_layer_ids]
        config["eagle_config"] = {_AUX_LAYERS: list(aux_layer_ids), "use_aux_hidden_state": True}
    return config


def _check_shapes(tensors: Mapping[str, Tensor], config: Eagle3DraftConfig) -> None:
    expected = weight_shapes(config)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(f"the draft's weights must hold {name}, which is missing")
        if name not in expected:
            raise CheckpointError(
                f"the draft's weights must be those of one EAGLE-3 layer, got {name} as well"
            )
        if tuple(tensors[name].shape) != expected[name]:
            raise CheckpointError(
                f"{name} must have shape {list(expected[name])}, got {list(tensors[name].shape)}"
            )


def _replace_directory(output_dir: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[Path]:
    """Writes beside `output_dir`, then renames: whoever looks sees a whole export or none."""
    files = [_CONFIG_FILE, _WEIGHTS_FILE]
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / _CONFIG_FILE).is_file():
        raise ConfigError(
            f"serving.dir must be free or hold an earlier export, got {output_dir}, which holds other files"
        )
    fresh, stale = (output_dir.with_name(f".{output_dir.name}.{kind}") for kind in ("fresh", "stale"))
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    (fresh / _CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, fresh / _WEIGHTS_FILE, metadata={"format": "pt"})
    # safetensors makes files that only their owner reads; whoever serves the draft may be someone else.
    (fresh / _WEIGHTS_FILE).chmod((fresh / _CONFIG_FILE).stat().st_mode)
    if output_dir.exists():
        output_dir.rename(stale)
    fresh.rename(output_dir)
    shutil.rmtree(stale, ignore_errors=True)
    return [output_dir / name for name in files]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be a JSON file: {error}") from error
    required = {"architectures": [ARCHITECTURE], "num_hidden_layers": 1, "tie_word_embeddings": False}
    for name, value in required.items():
        if raw.get(name) != value:
            raise CheckpointError(f"{path}: {name} must be {value}, got {raw.get(name)}")
    return raw


def _read_aux_layers(raw: dict[str, Any], directory: Path) -> tuple[int, ...] | None:
    before_layer = raw.get(_AUX_LAYERS)
    after_layer = (raw.get("eagle_config") or {}).get(_AUX_LAYERS)
    if before_layer is None:
        return None if after_layer is None else tuple(after_layer)
    aux_layer_ids = tuple(layer - 1 for layer in before_layer)
    if after_layer is not None and tuple(after_layer) != aux_layer_ids:
        raise CheckpointError(
            f"{directory / _CONFIG_FILE}: eagle_config.{_AUX_LAYERS} must be one less than {before_layer}, got {after_layer}"
        )
    return aux_layer_ids
