"""Other names of functions of `eagle_rpc.supervision`."""

from typing import Any

from torch import Tensor

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import DraftHead, ModelInfo, TokenBatch, as_target, supervise
from eagle_rpc.supervision import check_encoding as check_target_encoding
from eagle_rpc.supervision import describe_target as describe
from eagle_rpc.supervision import device_of as device_of_target
from eagle_rpc.supervision import run_target as run

__all__ = ["check_encoding", "describe_target", "device_of", "exact_draft_head", "run_target", "supervise"]


def run_target(target: Any, tokens: TokenBatch) -> Any:
    return run(as_target(target), tokens)


def device_of(target: Any) -> Any:
    return device_of_target(target)


def describe_target(target: Any, config: TargetConfig, incarnation: str | None = None) -> ModelInfo:
    return describe(
        as_target(target),
        max_length=config.max_length,
        max_batch_tokens=config.max_batch_tokens,
        chunk_rows=config.chunk_rows,
        incarnation=incarnation,
    )


def exact_draft_head(target: Any, selected_token_ids: Tensor) -> DraftHead:
    return as_target(target).draft_head(selected_token_ids)


def check_encoding(target: Any, selected_token_ids: Tensor, encoding: str) -> None:
    check_target_encoding(as_target(target), selected_token_ids, encoding)
