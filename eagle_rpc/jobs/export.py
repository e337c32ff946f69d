"""Exports a draft to the directory that serving engines load.

Legend: H hidden, V target vocab.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from eagle_rpc.config import Config
from eagle_rpc.config.schema import ServingConfig
from eagle_rpc.errors import CheckpointError
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.process.startup import start_worker
from eagle_rpc.serving import ServedForm, check_form, export_draft, warn_of_engines
from eagle_rpc.serving.export import EMBEDDING
from eagle_rpc.train import (
    Checkpoint,
    RunRecord,
    best_checkpoint,
    checkpoint_of,
    latest_checkpoint,
    latest_whole_checkpoint,
    load_target_embedding,
    read_checkpoint,
)

logger = logging.getLogger(__name__)

_BEST, _LATEST = "best", "latest"  # values of `serving.checkpoint`


def run(config: Config) -> int:
    """Writes `serving.dir`; always 0. Raises `CheckpointError` if there is nothing to export."""
    start_worker(config, "export")
    directory, serving = RunDirectory.of(config), config.serving
    path, checkpoint = _chosen(directory.checkpoints, serving.checkpoint)
    embedding = checkpoint.draft_weights.get(EMBEDDING)
    if embedding is None:
        embedding = load_target_embedding(path.parent / directory.target_embedding.name)
    files = export_run(checkpoint.draft_weights, checkpoint.record, embedding, serving)
    history = checkpoint.history
    judged = f" with accept length {history.best_accept_length:.3f} in validation"
    of_best = judged if history.best_step == checkpoint.step else ""
    logger.info("exported step %d%s: %s", checkpoint.step, of_best, ", ".join(map(str, files)))
    return 0


def _chosen(checkpoints: Path, setting: str | None) -> tuple[Path, Checkpoint]:
    """The checkpoint that `serving.checkpoint` means, of those in this directory."""
    if setting == _LATEST:
        return _newest(checkpoints)
    if setting in (None, _BEST):
        best = best_checkpoint(checkpoints)
        if best is not None:
            return best, read_checkpoint(best)
        if setting is None:
            return _newest(checkpoints)
        raise CheckpointError(
            f"{checkpoints} must hold a validated checkpoint for serving.checkpoint=best, got none"
        )
    path = checkpoint_of(checkpoints, int(setting)) if setting.isdecimal() else Path(setting)
    return path, read_checkpoint(path)


def _newest(checkpoints: Path) -> tuple[Path, Checkpoint]:
    """Raises `CheckpointError` if the newest checkpoint is damaged; an older one is named, not exported."""
    whole = latest_whole_checkpoint(checkpoints)
    if whole is None:
        raise CheckpointError(
            f"{checkpoints} must hold a checkpoint to export, got none: run job=train first"
        )
    path, newest = whole[0], latest_checkpoint(checkpoints)
    if path != newest:
        raise CheckpointError(
            f"{newest} must be whole to be exported, it is damaged; train on with train.resume=auto, or "
            f"export an older one with serving.checkpoint={path}"
        )
    return whole


def export_run(
    weights: Mapping[str, Tensor], record: RunRecord, embedding_VH: Tensor, settings: ServingConfig
) -> list[Path]:
    """Exports the draft of a run with this embedding; returns the files. Raises as `export_draft` and `check_form`."""
    target = record.target
    form = ServedForm(
        config=record.draft_config,
        aux_layer_ids=target.aux_layer_ids,
        num_target_layers=target.num_layers,
        target=target.architecture,
        own_embedding=EMBEDDING in weights,
    )
    check_form(form, settings.engines)
    warn_of_engines(form, settings.engines)
    return export_draft(
        weights,
        record.draft_config,
        record.mapping,
        Path(settings.dir),
        dtype=getattr(torch, settings.dtype.value),
        aux_layer_ids=record.target.aux_layer_ids,
        target_embedding=embedding_VH,
        bos_token_id=record.bos_token_id,
        eos_token_id=record.eos_token_id,
    )
