"""Exports a draft to the directory that serving engines load.

Legend: H hidden, V target vocab.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from eagle_rpc.config import Config
from eagle_rpc.config.choices import DType
from eagle_rpc.errors import CheckpointError
from eagle_rpc.process.startup import start_worker
from eagle_rpc.serving import export_draft
from eagle_rpc.train import (
    Checkpoint,
    RunDirectory,
    RunRecord,
    latest_checkpoint,
    latest_whole_checkpoint,
    load_target_embedding,
    read_checkpoint,
)

logger = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Writes `serving.dir`; always 0. Raises `CheckpointError` if there is nothing to export."""
    start_worker(config, "export")
    directory = RunDirectory.of(config)
    named = config.serving.checkpoint
    path, checkpoint = _newest(directory) if named is None else (Path(named), read_checkpoint(Path(named)))
    embedding = load_target_embedding(path.parent / directory.target_embedding.name)
    serving = config.serving
    files = export_run(checkpoint.weights, checkpoint.record, embedding, Path(serving.dir), serving.dtype)
    logger.info("exported step %d: %s", checkpoint.step, ", ".join(map(str, files)))
    return 0


def _newest(directory: RunDirectory) -> tuple[Path, Checkpoint]:
    """Raises `CheckpointError` if the newest checkpoint is damaged; an older one is named, not exported."""
    whole = latest_whole_checkpoint(directory.checkpoints)
    if whole is None:
        raise CheckpointError(
            f"{directory.checkpoints} must hold a checkpoint to export, got none: run job=train first"
        )
    path, newest = whole[0], latest_checkpoint(directory.checkpoints)
    if path != newest:
        raise CheckpointError(
            f"{newest} must be whole to be exported, it is damaged; train on with train.resume=auto, or "
            f"export an older one with serving.checkpoint={path}"
        )
    return whole


def export_run(
    weights: Mapping[str, Tensor], record: RunRecord, embedding_VH: Tensor, directory: Path, dtype: DType
) -> list[Path]:
    """Exports the draft of a run; returns the files. Raises as `export_draft`."""
    return export_draft(
        weights,
        record.draft_config,
        record.mapping,
        directory,
        dtype=getattr(torch, dtype.value),
        aux_layer_ids=record.target.aux_layer_ids,
        num_target_layers=record.target.num_layers,
        target_embedding=embedding_VH,
        bos_token_id=record.bos_token_id,
        eos_token_id=record.eos_token_id,
    )
