"""What a trainer sends: token ids and masks of a batch.

Legend: B batch, T sequence.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision.shift import shift_left
from eagle_rpc.supervision.storage import to_device

_MASK_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64)


@dataclass(kw_only=True, slots=True)
class TokenBatch:
    """Tokens of B sequences, padded on the right."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool or integer, 1 for real tokens, then 0
    loss_mask: Tensor  # [B, T] bool or integer, 1 for tokens that the draft learns to predict
    segment_ids: Tensor | None = None  # [B, T] int64; chats packed into one row have different ids

    @property
    def shape(self) -> tuple[int, int]:
        return self.input_ids.shape[0], self.input_ids.shape[1]

    def to(self, device: torch.device) -> "TokenBatch":
        """The same tokens there, on their way as `to_device` says."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenBatch(
            **{
                name: None if column is None else to_device(column, device)
                for name, column in columns.items()
            }
        )

    def check(self, *, vocab_size: int, max_length: int, max_tokens: int) -> None:
        """Raises `InvalidRequest` naming field, rule and value. Reads nothing but this batch."""
        _check_shapes(self, max_length=max_length, max_tokens=max_tokens)
        lowest, highest = int(self.input_ids.min()), int(self.input_ids.max())
        if lowest < 0 or highest >= vocab_size:
            raise InvalidRequest(
                f"input_ids must lie in [0, {vocab_size}), got values from {lowest} to {highest}"
            )
        for name in ("attention_mask", "loss_mask"):
            mask = getattr(self, name)
            if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
                raise InvalidRequest(
                    f"{name} must hold 0 and 1 only, got values from {int(mask.min())} to {int(mask.max())}"
                )
        real = self.attention_mask.bool()
        if bool((~real[:, :-1] & real[:, 1:]).any()):
            raise InvalidRequest("attention_mask must be padded on the right, got a real token after padding")
        if not bool(real[:, 0].all()):
            raise InvalidRequest(
                "attention_mask must keep at least one token of each sequence, got an empty sequence"
            )
        if bool((self.loss_mask.bool() & ~real).any()):
            raise InvalidRequest(
                "loss_mask must be 0 where attention_mask is 0, got a supervised padding token"
            )
        if self.segment_ids is not None and bool(
            (self.segment_ids[:, 1:] < self.segment_ids[:, :-1])[real[:, 1:]].any()
        ):
            raise InvalidRequest("segment_ids must not decrease along a row, got a decreasing pair")


def _check_shapes(tokens: TokenBatch, *, max_length: int, max_tokens: int) -> None:
    for field in fields(tokens):
        value = getattr(tokens, field.name)
        if value is None and field.name == "segment_ids":
            continue
        if not isinstance(value, Tensor):
            raise InvalidRequest(f"{field.name} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta:
            raise InvalidRequest(
                f"{field.name} must be a dense tensor with data, got {value.layout} on {value.device}"
            )
        if value.dim() != 2:
            raise InvalidRequest(f"{field.name} must have shape [B, T], got {list(value.shape)}")
        if value.shape != tokens.input_ids.shape:
            raise InvalidRequest(
                f"{field.name} must have the shape of input_ids {list(tokens.input_ids.shape)}, got {list(value.shape)}"
            )
        allowed = _MASK_DTYPES if field.name.endswith("mask") else (torch.int64,)
        if value.dtype not in allowed:
            raise InvalidRequest(
                f"{field.name} must have dtype {' or '.join(map(str, allowed))}, got {value.dtype}"
            )
    batch, length = tokens.shape
    if batch == 0 or length == 0:
        raise InvalidRequest(f"input_ids must hold at least one token, got shape {[batch, length]}")
    if length > max_length:
        raise InvalidRequest(
            f"input_ids must be at most {max_length} tokens long (the target's limit), got {length}"
        )
    if batch * length > max_tokens:
        raise InvalidRequest(
            f"input_ids must hold at most {max_tokens} tokens in all, got {batch} x {length} = {batch * length}"
        )


def shifted_loss_mask(tokens: TokenBatch) -> Tensor:
    """Rows that may be supervised, [B, T] bool.

    Row t is judged by the target's output at position t + 1, so the mask moves with it; with packing a row whose
    position t + 1 belongs to the next chat is left out.
    """
    mask = shift_left(tokens.loss_mask.bool())
    if tokens.segment_ids is not None:
        mask[:, :-1] &= tokens.segment_ids[:, 1:] == tokens.segment_ids[:, :-1]
    return mask


@dataclass(frozen=True, slots=True)
class BatchRows:
    """Flat places b * T + t in a batch, known from its masks alone."""

    real: Tensor  # [R] int64, of real tokens, ascending
    supervisable: Tensor  # [N] int64, rows that may be supervised, ascending

    @classmethod
    def of(cls, tokens: TokenBatch) -> "BatchRows":
        """Where `tokens` are; on a GPU their numbers have to be waited for."""
        return cls(true_places(tokens.attention_mask.bool()), true_places(shifted_loss_mask(tokens)))

    def to(self, device: torch.device) -> "BatchRows":
        return BatchRows(to_device(self.real, device), to_device(self.supervisable, device))


def true_places(mask_BT: Tensor) -> Tensor:
    """Flat places [N] int64 of what is true, ascending."""
    return mask_BT.flatten().nonzero().squeeze(1)
