"""One batch through one target: the code that the service and the co-located backend share."""

import dataclasses
import uuid
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.supervision import (
    DraftHead,
    DraftVocabOnDevice,
    EncodedSupervision,
    ModelInfo,
    TokenBatch,
    encode_supervision,
    weights_fingerprint,
)


@torch.no_grad()
def supervise(
    target: Any, tokens: TokenBatch, vocab: DraftVocabOnDevice, *, encoding: str, rows: str, chunk_rows: int
) -> EncodedSupervision:
    """Runs `target` (an `Eagle3Target`) on checked `tokens` of any device and encodes what it gives, on the target's device."""
    return encode_supervision(
        run_target(target, tokens), tokens, vocab, encoding=encoding, rows=rows, chunk_rows=chunk_rows
    )


def run_target(target: Any, tokens: TokenBatch) -> Any:
    """What the `generate_batch` of an `Eagle3Target` returns for `tokens` of any device."""
    if not getattr(target, "takes_host_tokens", False):
        tokens = tokens.to(device_of(target))
    packing = {} if tokens.segment_ids is None else {"segment_ids": tokens.segment_ids}
    return target.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask, **packing)


def device_of(target: Any) -> torch.device:
    """Where the target wants its token ids."""
    return target.get_input_embeddings().weight.device


def describe_target(target: Any, config: TargetConfig, incarnation: str | None = None) -> ModelInfo:
    """Identity of `target`, the limits of `config`, and the incarnation: a random one unless it is given.

    A target without `model_info` is described by its token embedding. Raises `ConfigError` if the configured
    length exceeds the model's context.
    """
    if hasattr(target, "model_info"):
        info = target.model_info()
        if config.max_length is not None and config.max_length > info.max_length:
            raise ConfigError(
                f"target.max_length must be at most the model's context {info.max_length}, got {config.max_length}"
            )
    else:
        info = _describe_embedding(target, config)
    return dataclasses.replace(
        info,
        max_length=config.max_length or info.max_length,
        max_batch_tokens=config.max_batch_tokens,
        incarnation=incarnation or uuid.uuid4().hex,
        # Matrix products of other shapes round differently.
        form=", ".join(filter(None, [info.form, f"{config.chunk_rows} rows a projection"])),
    )


def _describe_embedding(target: Any, config: TargetConfig) -> ModelInfo:
    embedding = target.get_input_embeddings()
    return ModelInfo(
        architecture=type(target).__name__,
        vocab_size=embedding.weight.shape[0],
        hidden_size=embedding.weight.shape[1],
        num_layers=0,
        aux_layer_ids=(),
        dtype=str(embedding.weight.dtype).removeprefix("torch."),
        max_length=config.max_batch_tokens,
        max_batch_tokens=config.max_batch_tokens,
        tokenizer_fingerprint=None,
        weights_fingerprint=weights_fingerprint(embedding),
        incarnation="",
    )


def exact_draft_head(target: Any, selected_token_ids: Tensor) -> DraftHead:
    """The head's rows for K target ids; raises `UnsupportedTarget` for a target that offers none."""
    if not hasattr(target, "draft_head"):
        raise UnsupportedTarget(
            f"target {type(target).__name__} gives no rows of its head; use supervision.encoding=logits"
        )
    return target.draft_head(selected_token_ids)


def check_encoding(target: Any, selected_token_ids: Tensor, encoding: str) -> None:
    """Raises `UnsupportedTarget` if trainers could not rebuild this target's distribution from `encoding`."""
    if encoding == "hidden":
        exact_draft_head(target, selected_token_ids)
        if hasattr(target, "probe_head"):
            target.probe_head(selected_token_ids)
