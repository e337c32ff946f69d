"""Checkpoints on disk: `checkpoints/step_N/`, whole or not there at all.

A checkpoint is written under a hidden name, forced to the disk and renamed, so whatever is called `step_N` is complete.
The learning rate follows from the step, and training draws no random numbers once the draft is initialised (the data's
order follows from the seed), so neither needs a state of its own.
"""

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle_rpc.errors import CheckpointError, EagleRpcError
from eagle_rpc.supervision import VocabMapping
from eagle_rpc.train.record import RunRecord

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d+)")
_FACTS, _WEIGHTS, _OPTIMISER = "checkpoint.json", "draft.safetensors", "optimiser.safetensors"
_MAPPING = "vocab_mapping.safetensors"
_PARTIAL, _REMOVED = ".partial", ".removed"
_EMBEDDING_KEY = "embed_tokens.weight"


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """All that a run needs to go on bit for bit. Tensors are on the CPU when read."""

    step: int  # optimiser steps done
    micro_batches: int  # consumed by each trainer, prefetched ones not counted
    record: RunRecord
    weights: dict[str, Tensor]  # of the draft, without frozen embeddings
    optimiser: dict[str, Tensor]  # as `optimiser_tensors` gives it
    running_sums: list[float]  # figures since the last line of metrics


def write_checkpoint(directory: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Adds `directory/step_N`, then removes all but the `keep` newest. A kill at any moment leaves the old ones usable."""
    final = directory / f"step_{checkpoint.step}"
    partial = directory / f".{final.name}{_PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    mapping = checkpoint.record.mapping
    _save_tensors(partial / _WEIGHTS, checkpoint.weights)
    _save_tensors(partial / _OPTIMISER, checkpoint.optimiser)
    _save_tensors(partial / _MAPPING, {"selected_token_ids": mapping.selected_token_ids})
    facts = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "micro_batches": checkpoint.micro_batches,
        "running_sums": checkpoint.running_sums,
        **checkpoint.record.to_json(),
    }
    (partial / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    _force_to_disk(partial / _FACTS)
    _force_to_disk(partial)
    partial.rename(final)
    _force_to_disk(directory)
    for _, path in _complete(directory)[:-keep]:
        _remove(path)
    logger.info("saved %s", final)
    return final


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint, null if there is none."""
    complete = _complete(directory)
    return complete[-1][1] if complete else None


def remove_leftovers(directory: Path) -> None:
    """Clears what a killed write or removal left behind. Only the process that writes checkpoints may call this."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.suffix in (_PARTIAL, _REMOVED):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises `CheckpointError` naming the file and the rule that it breaks."""
    facts = _read_facts(path / _FACTS)
    selected = _load_tensors(path / _MAPPING)
    try:
        mapping = VocabMapping.from_token_ids(
            selected["selected_token_ids"], facts["draft_config"]["vocab_size"]
        )
        if mapping.digest != facts["mapping_digest"]:
            raise CheckpointError(
                f"{path / _MAPPING} must have digest {facts['mapping_digest']}, got {mapping.digest}"
            )
        return Checkpoint(
            step=facts["step"],
            micro_batches=facts["micro_batches"],
            record=RunRecord.from_json(facts, mapping),
            weights=_load_tensors(path / _WEIGHTS),
            optimiser=_load_tensors(path / _OPTIMISER),
            running_sums=facts["running_sums"],
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, EagleRpcError) as error:
        raise CheckpointError(f"{path} must be a checkpoint of format {FORMAT_VERSION}: {error!r}") from error


def save_target_embedding(path: Path, embedding: Tensor) -> None:
    """Keeps the target's token embedding [V, H] once for all checkpoints of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    _save_tensors(partial, {_EMBEDDING_KEY: embedding})
    partial.replace(path)
    _force_to_disk(path.parent)


def load_target_embedding(path: Path) -> Tensor:
    """[V, H] in the target's dtype. Raises `CheckpointError` if it is absent or damaged."""
    tensors = _load_tensors(path)
    if _EMBEDDING_KEY not in tensors:
        raise CheckpointError(f"{path} must hold {_EMBEDDING_KEY}, got {sorted(tensors)}")
    return tensors[_EMBEDDING_KEY]


def _complete(directory: Path) -> list[tuple[int, Path]]:
    """Steps and paths, oldest first."""
    if not directory.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((int(match[1]), path) for match, path in named if match)


def _remove(path: Path) -> None:
    """Takes the name away first: a half removed directory must not look like a checkpoint."""
    doomed = path.with_name(f".{path.name}{_REMOVED}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be a JSON file: {error}") from error
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version must be {FORMAT_VERSION}, got {version}")
    return facts


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    _force_to_disk(path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} must be a safetensors file: {error}") from error


def _force_to_disk(path: Path) -> None:
    """A rename may reach the disk before what was written, unless that is waited for."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
