"""The directory of a draft that engines serve: `config.json`, `model.safetensors` and a model card.

Names and keys are those that the engines read (`tensor_names`, `plain_config`), with an untied head, explicit
rotary settings and `d2t` as offsets. The form of speculators (`speculators_config`) has others.
Legend: H hidden, V target vocab.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.errors import CheckpointError, ConfigError, InvalidRequest
from eagle_rpc.process.files import replaced_directory
from eagle_rpc.serving.hub import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, local_copy, upload
from eagle_rpc.serving.plain_config import plain_config, read_plain_config
from eagle_rpc.serving.speculators_config import Speculators, as_plain, speculators_config
from eagle_rpc.serving.tensor_names import draft_names, exported_names, speculators_names
from eagle_rpc.supervision import VocabMapping

EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedDraft:
    """The content of an export."""

    config: Eagle3DraftConfig
    weights: dict[str, Tensor]  # those of `weight_shapes`, in the exported dtype
    mapping: VocabMapping
    aux_layer_ids: tuple[int, ...] | None  # counted after the layer; None: the target's default layers
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    card: str | None = None  # the content of its model card

    def model(self) -> Eagle3Draft:
        """The draft as a module, with fp32 weights on the CPU, its embedding in the exported dtype."""
        draft = Eagle3Draft(self.config, self.weights[EMBEDDING])
        draft.load_state_dict(self.weights)
        return draft

    @classmethod
    def from_pretrained(cls, name: str | Path, **download: Any) -> "ExportedDraft":
        """The draft of a directory, or of a repository of the Hugging Face hub (`owner/name`).

        `download` are arguments of `huggingface_hub.snapshot_download`, as `revision`, `token`, `cache_dir`,
        `local_files_only`. Raises `CheckpointError` for a damaged draft, and its errors.
        """
        return load_export(local_copy(name, **download))

    def save_pretrained(self, directory: str | Path, *, speculators: Speculators | None = None) -> list[Path]:
        """Writes weights, configuration and card, in place of an earlier export; returns the files.

        With `speculators` in that form. Raises `ConfigError` if `directory` holds other files, or if the draft
        names no captured layers.
        """
        if self.aux_layer_ids is None:
            raise ConfigError("a draft must name its captured layers to be saved, got null")
        return export_draft(
            self.weights,
            self.config,
            self.mapping,
            Path(directory),
            dtype=self.weights[EMBEDDING].dtype,
            aux_layer_ids=self.aux_layer_ids,
            target_embedding=self.weights[EMBEDDING],
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            speculators=speculators,
            card=self.card,
        )

    def push_to_hub(self, repo_id: str, *, speculators: Speculators | None = None, **settings: Any) -> str:
        """Saves the draft in a repository of the hub, which is made if it is absent; returns the commit's URL.

        `settings`: `private`, `token`, `revision`, `commit_message`, `create_pr`. Raises as `save_pretrained`, and
        the errors of `huggingface_hub`.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch, "draft"), speculators=speculators)
            return upload(Path(scratch, "draft"), repo_id, **settings)


def export_draft(
    weights: Mapping[str, Tensor],
    draft_config: Eagle3DraftConfig,
    mapping: VocabMapping,
    output_dir: Path,
    *,
    dtype: torch.dtype,
    aux_layer_ids: Sequence[int],
    target_embedding: Tensor,
    bos_token_id: int | None,
    eos_token_id: int | list[int] | None,
    speculators: Speculators | None = None,
    card: str | None = None,
) -> list[Path]:
    """Writes the plain form, or that of `speculators`, to `output_dir` in place of an earlier export.

    Returns the files, the model card `card` among them.

    `weights` are the draft's parameters by name (`weight_shapes`), without embedding or with one that
    `target_embedding` [V, H] replaces: the target's, or the draft's own if it is trained. `aux_layer_ids` are
    counted after the layer.

    Raises `CheckpointError` if a weight is missing, unknown, or has another shape than the config says;
    `ConfigError` if mapping and config disagree, layers do not ascend, or `output_dir` holds other files.
    """
    if list(aux_layer_ids) != sorted(aux_layer_ids):
        raise ConfigError(
            "target.aux_layer_ids must ascend: serving engines join hidden states in layer order, "
            f"got {list(aux_layer_ids)}"
        )
    tensors = {**weights, EMBEDDING: target_embedding}
    _check_shapes(tensors, draft_config)
    if (len(mapping), mapping.target_vocab_size) != (draft_config.draft_vocab_size, draft_config.vocab_size):
        raise ConfigError(
            f"the mapping must hold {draft_config.draft_vocab_size} of {draft_config.vocab_size} tokens "
            f"as the draft's config says, got {len(mapping)} of {mapping.target_vocab_size}"
        )
    stored = exported_names(
        {name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in tensors.items()}
    )
    # Engines read a missing map as the identity, and vLLM refuses an identity map.
    if len(mapping) < mapping.target_vocab_size:
        stored |= {"d2t": mapping.d2t, "t2d": mapping.t2d}
    config = plain_config(draft_config, dtype=dtype, aux_layer_ids=aux_layer_ids) | {
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
    }
    if speculators is not None:
        config, stored = speculators_config(config, speculators), speculators_names(stored)
    return _write(output_dir, config, stored, card)


def weight_shapes(config: Eagle3DraftConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every floating point tensor of an export: those of the draft itself."""
    with torch.device("meta"):
        draft = Eagle3Draft(config, torch.empty(config.vocab_size, config.hidden_size))
    return {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}


def load_export(directory: Path) -> ExportedDraft:
    """Reads an export of `export_draft`, in either form. Raises `CheckpointError` naming file, rule and value."""
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    raw = as_plain(_read_config(config_path))
    config, aux_layer_ids = read_plain_config(raw, config_path)
    try:
        tensors = load_file(weights_path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights_path} must be a safetensors file: {error}") from error
    tensors = draft_names(tensors, weights_path)
    offsets = tensors.pop("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
    membership = tensors.pop("t2d", None)
    _check_shapes(tensors, config)
    try:
        mapping = VocabMapping.from_token_ids(offsets + torch.arange(len(offsets)), config.vocab_size)
    except InvalidRequest as error:
        raise CheckpointError(
            f"{weights_path}: d2t must hold offsets to distinct target ids: {error}"
        ) from error
    same_tokens = membership is None or torch.equal(membership, mapping.t2d)
    if len(mapping) != config.draft_vocab_size or not same_tokens:
        raise CheckpointError(
            f"{weights_path}: d2t and t2d must name the same {config.draft_vocab_size} tokens"
        )
    card = directory / CARD_FILE
    return ExportedDraft(
        config=config,
        weights=tensors,
        mapping=mapping,
        aux_layer_ids=aux_layer_ids,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
        card=card.read_text(encoding="utf-8") if card.is_file() else None,
    )


def _check_shapes(tensors: Mapping[str, Tensor], config: Eagle3DraftConfig) -> None:
    expected = weight_shapes(config)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(f"the draft's weights must hold {name}, which is missing")
        if name not in expected:
            raise CheckpointError(
                f"the draft's weights must be those that its config names, got {name} as well"
            )
        shape = tuple(tensors[name].shape)
        if shape != expected[name]:
            raise CheckpointError(f"{name} must have shape {list(expected[name])}, got {list(shape)}")


def _write(
    output_dir: Path, config: dict[str, Any], tensors: dict[str, Tensor], card: str | None
) -> list[Path]:
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / CONFIG_FILE).is_file():
        raise ConfigError(
            f"serving.dir must be free or hold an earlier export, got {output_dir}, which holds other files"
        )
    content = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with replaced_directory(output_dir) as fresh:
        (fresh / CONFIG_FILE).write_text(content, encoding="utf-8")
        save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read, but another user may serve the draft.
        (fresh / WEIGHTS_FILE).chmod((fresh / CONFIG_FILE).stat().st_mode)
        if card is not None:
            (fresh / CARD_FILE).write_text(card, encoding="utf-8")
    names = (CONFIG_FILE, WEIGHTS_FILE, *(() if card is None else (CARD_FILE,)))
    return [output_dir / name for name in names]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be a JSON file: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw
