"""Checkpoints on disk: `checkpoints/step_N/`, complete or absent.

The learning rate follows from the step, the data order from seed and position, and training draws no random
numbers after the draft is initialised: so none of them needs a state of its own.
"""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle_rpc.errors import CheckpointError, EagleRpcError
from eagle_rpc.process.files import (
    is_lfs_pointer,
    remove_directory,
    remove_unfinished,
    replace_link,
    replaced_directory,
    replaced_file,
)
from eagle_rpc.supervision import VocabMapping
from eagle_rpc.train.history import ValidationHistory
from eagle_rpc.train.learner import LearnerState
from eagle_rpc.train.record import RunRecord

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_NAME = re.compile(r"step_(\d+)")
_FACTS, _WEIGHTS, _OPTIMISER = "checkpoint.json", "draft.safetensors", "optimiser.safetensors"
_AVERAGE, _MAPPING = "average.safetensors", "vocab_mapping.safetensors"
_EMBEDDING_KEY = "embed_tokens.weight"


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """The state from which a run continues bit for bit. Tensors are on the CPU after reading."""

    step: int  # optimiser steps done
    sequences: int  # of the data, consumed by all trainers, without prefetched ones
    record: RunRecord
    state: LearnerState
    running_sums: list[float]  # figures since the last line of metrics
    history: ValidationHistory

    @property
    def draft_weights(self) -> dict[str, Tensor]:
        """The weights that validation judged and an export takes."""
        return self.state.average or self.state.weights


def write_checkpoint(directory: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Adds `directory/step_N`, keeps the `keep` newest and the best, and points the links at newest and best.

    A kill at any moment leaves the old ones usable.
    """
    final = checkpoint_of(directory, checkpoint.step)
    facts = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "sequences": checkpoint.sequences,
        "running_sums": checkpoint.running_sums,
        "reached_steps": checkpoint.state.reached_steps,
        "validations": checkpoint.history.to_json(),
        **checkpoint.record.to_json(),
    }
    selected = checkpoint.record.mapping.selected_token_ids
    with replaced_directory(final) as fresh:
        _save_tensors(fresh / _WEIGHTS, checkpoint.state.weights)
        _save_tensors(fresh / _OPTIMISER, checkpoint.state.optimiser)
        if checkpoint.state.average:
            _save_tensors(fresh / _AVERAGE, checkpoint.state.average)
        _save_tensors(fresh / _MAPPING, {"selected_token_ids": selected})
        (fresh / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    point_links(directory, checkpoint)
    for step, path in _complete(directory)[:-keep]:
        if step != checkpoint.history.best_step:
            remove_directory(path)
    logger.info("saved %s", final)
    return final


def point_links(directory: Path, checkpoint: Checkpoint) -> None:
    """Lets `latest` and `best` name this checkpoint and the best one so far. For people and scripts only."""
    for name, step in (("latest", checkpoint.step), ("best", checkpoint.history.best_step)):
        if step is None or not checkpoint_of(directory, step).is_dir():
            continue
        try:
            replace_link(directory / name, checkpoint_of(directory, step).name)
        except OSError as error:  # a file system without links
            logger.warning("%s cannot be a link to step %d: %s", directory / name, step, error)


def checkpoint_of(directory: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return directory / f"step_{step}"


def best_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with the highest accept length in validation, by the record of the newest one.

    None without a validation, or if it was not copied along. Raises `CheckpointError` for a damaged record.
    """
    newest = latest_checkpoint(directory)
    step = None if newest is None else _history_of(_read_facts(newest / _FACTS)).best_step
    best = None if step is None else checkpoint_of(directory, step)
    return best if best is not None and best.is_dir() else None


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint; None if there is none."""
    complete = _complete(directory)
    return complete[-1][1] if complete else None


def latest_whole_checkpoint(directory: Path) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint that can be read, with a warning about each newer one; None if there is none.

    Raises the `CheckpointError` of the newest one if all are damaged.
    """
    damage: list[CheckpointError] = []
    for _, path in reversed(_complete(directory)):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            damage.append(error)
            continue
        for reason in damage:
            logger.warning("going back to %s, since a newer checkpoint is damaged: %s", path, reason)
        return path, checkpoint
    if damage:
        raise damage[0]
    return None


def remove_leftovers(directory: Path) -> None:
    """Removes what killed processes left unfinished. Only the process that writes checkpoints may call it."""
    if directory.is_dir():
        remove_unfinished(directory)


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises `CheckpointError` naming the file and the rule that it breaks."""
    facts = _read_facts(path / _FACTS)
    selected = _load_tensors(path / _MAPPING)
    try:
        target_vocab_size = facts["draft_config"]["vocab_size"]
        mapping = VocabMapping.from_token_ids(selected["selected_token_ids"], target_vocab_size)
        if mapping.digest != facts["mapping_digest"]:
            raise CheckpointError(
                f"{path / _MAPPING} must have digest {facts['mapping_digest']}, got {mapping.digest}"
            )
        return Checkpoint(
            step=facts["step"],
            sequences=facts["sequences"],
            record=RunRecord.from_json(facts, mapping),
            state=LearnerState(
                weights=_load_tensors(path / _WEIGHTS),
                optimiser=_load_tensors(path / _OPTIMISER),
                average=_load_tensors(path / _AVERAGE) if (path / _AVERAGE).exists() else {},
                reached_steps=facts.get("reached_steps", []),  # earlier versions learned none
            ),
            running_sums=facts["running_sums"],
            history=_history_of(facts),
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, EagleRpcError) as error:
        raise CheckpointError(f"{path} must be a checkpoint of format {FORMAT_VERSION}: {error!r}") from error


def save_target_embedding(path: Path, embedding: Tensor) -> None:
    """Writes the target's token embedding [V, H] once for all checkpoints of a run."""
    with replaced_file(path) as fresh:
        _save_tensors(fresh, {_EMBEDDING_KEY: embedding})


def load_target_embedding(path: Path) -> Tensor:
    """[V, H] in the target's dtype. Raises `CheckpointError` if it is missing or damaged."""
    if not path.exists():
        raise CheckpointError(
            f"{path} must hold the target's token embedding, got no such file: copy it from the run, or run "
            "job=train with train.resume=auto once more, which writes it"
        )
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


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be a JSON file: {error}") from error
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version must be {FORMAT_VERSION}, got {version}")
    return facts


def _history_of(facts: dict[str, Any]) -> ValidationHistory:
    """Earlier versions kept none; their validations were all done."""
    return ValidationHistory(**facts.get("validations", {"last_step": facts["step"]}))


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        pointer = path.is_file() and is_lfs_pointer(path)
        found = "a git-lfs pointer: run git lfs pull there" if pointer else error
        raise CheckpointError(f"{path} must be a whole safetensors file, got {found}") from error
