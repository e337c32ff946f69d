"""What a trainer sends: token ids and masks of a batch.

Legend: B batch, T sequence, R real tokens, N rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision.segments import chat_starts
from eagle_rpc.supervision.tensors import check_dense, shift_left, to_device

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

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "TokenBatch":
        """The same tokens, each tensor replaced by `function` of it."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenBatch(**{name: function(one) for name, one in tensors.items() if one is not None})

    def to(self, device: torch.device) -> "TokenBatch":
        """The same tokens on `device`, moved as `to_device` does."""
        return self.map_tensors(lambda tensor: to_device(tensor, device))

    def check(self, *, vocab_size: int, max_length: int, max_tokens: int) -> None:
        """Raises `InvalidRequest` that names field, rule and value."""
        _check_shapes(self, max_length=max_length, max_tokens=max_tokens)
        lowest, highest = int(self.input_ids.min()), int(self.input_ids.max())
        if lowest < 0 or highest >= vocab_size:
            raise InvalidRequest(
                f"input_ids must lie in [0, {vocab_size}), got values from {lowest} to {highest}"
            )
        for name, mask in (("attention_mask", self.attention_mask), ("loss_mask", self.loss_mask)):
            if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
                values = f"values from {int(mask.min())} to {int(mask.max())}"
                raise InvalidRequest(f"{name} must hold 0 and 1 only, got {values}")
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
        ids = self.segment_ids
        if ids is not None and bool((ids[:, 1:] < ids[:, :-1])[real[:, 1:]].any()):
            raise InvalidRequest("segment_ids must not decrease along a row, got a decreasing pair")


def _check_shapes(tokens: TokenBatch, *, max_length: int, max_tokens: int) -> None:
    for name, value in ((field.name, getattr(tokens, field.name)) for field in fields(tokens)):
        if value is None and name == "segment_ids":
            continue
        check_dense(name, value, _MASK_DTYPES if name.endswith("mask") else (torch.int64,))
        if value.dim() != 2:
            raise InvalidRequest(f"{name} must have shape [B, T], got {list(value.shape)}")
        if value.shape != tokens.input_ids.shape:
            shape = list(tokens.input_ids.shape)
            raise InvalidRequest(f"{name} must have the shape of input_ids {shape}, got {list(value.shape)}")
    batch, length = tokens.shape
    if batch == 0 or length == 0:
        raise InvalidRequest(f"input_ids must hold at least one token, got shape {[batch, length]}")
    if length > max_length:
        raise InvalidRequest(
            f"input_ids must be at most {max_length} tokens long (the target's limit), got {length}"
        )
    if batch * length > max_tokens:
        total = f"{batch} x {length} = {batch * length}"
        raise InvalidRequest(f"input_ids must hold at most {max_tokens} tokens in all, got {total}")


def shifted_loss_mask(tokens: TokenBatch) -> Tensor:
    """Rows that may be supervised, [B, T] bool.

    Row t is judged by the target's output at position t + 1, so the mask shifts with it. In a packed row the
    last row of each chat is left out, since its position t + 1 belongs to the next chat.
    """
    mask_BT = shift_left(tokens.loss_mask.bool())
    if tokens.segment_ids is not None:
        mask_BT[:, :-1] &= ~chat_starts(tokens.segment_ids)[:, 1:]
    return mask_BT


@dataclass(frozen=True, slots=True)
class BatchRows:
    """Flat places b * T + t of a batch that follow from its masks alone."""

    real: Tensor  # [R] int64, of real tokens, ascending
    supervisable: Tensor  # [N] int64, rows that may be supervised, ascending

    @classmethod
    def of(cls, tokens: TokenBatch) -> "BatchRows":
        """The places of `tokens`. With tokens on a GPU this waits for it, as R and N are shapes."""
        return cls(true_places(tokens.attention_mask.bool()), true_places(shifted_loss_mask(tokens)))

    def to(self, device: torch.device) -> "BatchRows":
        return BatchRows(to_device(self.real, device), to_device(self.supervisable, device))


def true_places(mask_BT: Tensor) -> Tensor:
    """Flat places [N] int64 where the mask is true, ascending."""
    return mask_BT.flatten().nonzero().squeeze(1)
