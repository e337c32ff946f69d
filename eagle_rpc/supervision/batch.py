"""What a trainer trains on: one batch of decoded supervision.

Legend: B batch, T sequence, H target hidden, K draft vocab, N supervised rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from eagle_rpc.supervision.draft_head import DraftHead
from eagle_rpc.supervision.shift import shift_left
from eagle_rpc.supervision.tokens import TokenBatch, shifted_loss_mask


class DraftTargets(Protocol):
    """The target's distribution over the draft vocabulary at N supervised rows, read in slices."""

    @property
    def draft_vocab_size(self) -> int:
        """K."""

    def logits(self, rows: slice) -> Tensor:
        """Draft-vocab logits of a slice of the N rows, [n, K]."""

    def probs(self, rows: slice) -> Tensor:
        """Softmax over the draft-vocab logits alone, [n, K] fp32."""

    def map_values(self, move: Callable[[Tensor], Tensor]) -> "DraftTargets":
        """The same targets with what `move` makes of the tensor of all rows."""


@dataclass(slots=True)
class StoredProbs:
    """Probabilities as they travelled; their logs serve as logits."""

    probs_NK: Tensor  # [N, K] fp32

    @property
    def draft_vocab_size(self) -> int:
        return self.probs_NK.shape[1]

    def logits(self, rows: slice) -> Tensor:
        return self.probs_NK[rows].log()

    def probs(self, rows: slice) -> Tensor:
        return self.probs_NK[rows]

    def map_values(self, move: Callable[[Tensor], Tensor]) -> "StoredProbs":
        return StoredProbs(move(self.probs_NK))


@dataclass(slots=True)
class StoredLogits:
    """Logits as they travelled."""

    logits_NK: Tensor  # [N, K] in the target's dtype

    @property
    def draft_vocab_size(self) -> int:
        return self.logits_NK.shape[1]

    def logits(self, rows: slice) -> Tensor:
        return self.logits_NK[rows]

    def probs(self, rows: slice) -> Tensor:
        return self.logits_NK[rows].float().softmax(dim=-1)

    def map_values(self, move: Callable[[Tensor], Tensor]) -> "StoredLogits":
        return StoredLogits(move(self.logits_NK))


@dataclass(slots=True)
class ProjectedTargets:
    """Last hidden states, projected onto the draft vocabulary when asked."""

    hidden_NH: Tensor  # [N, H] in the target's dtype
    head: DraftHead

    @property
    def draft_vocab_size(self) -> int:
        return self.head.weight.shape[0]

    def logits(self, rows: slice) -> Tensor:
        return self.head.project(self.hidden_NH[rows])

    def probs(self, rows: slice) -> Tensor:
        return self.logits(rows).float().softmax(dim=-1)

    def map_values(self, move: Callable[[Tensor], Tensor]) -> "ProjectedTargets":
        return replace(self, hidden_NH=move(self.hidden_NH))


@dataclass(kw_only=True, slots=True)
class Eagle3TargetBatch:
    """Supervision of one `TokenBatch`; tensors are on the trainer's device.

    Row r = b * T + t of the flattened batch is judged by the target's output at position t + 1 of sequence b.
    """

    tokens: TokenBatch  # as sent, not shifted
    aux_hidden_states: Tensor  # [B, T, 3H] target dtype, zero at padding
    supervised_rows: Tensor  # [N] int64, ascending flat rows that carry a target distribution
    targets: DraftTargets  # of those N rows
    log_normalizer: Tensor  # [N] fp32, logsumexp over the full vocabulary
    argmax: Tensor  # [N] int64, draft id of the target's most likely token, -1 outside the draft vocab
    input_ids: Tensor = field(init=False)  # [B, T] int64, shifted left
    loss_mask: Tensor = field(init=False)  # [B, T] bool, shifted left

    def __post_init__(self) -> None:
        self.input_ids = shift_left(self.tokens.input_ids)
        self.loss_mask = shifted_loss_mask(self.tokens)

    def map_large(self, move: Callable[[Tensor], Tensor]) -> "Eagle3TargetBatch":
        """The same batch with what `move` makes of its large tensors: the hidden states and the targets' values."""
        return replace(
            self, aux_hidden_states=move(self.aux_hidden_states), targets=self.targets.map_values(move)
        )

    @property
    def position_mask(self) -> Tensor:
        """[B, T, 1] bool: supervised and the target's most likely token is in the draft vocabulary."""
        batch, length = self.tokens.shape
        mask = torch.zeros(batch * length, dtype=torch.bool, device=self.supervised_rows.device)
        mask[self.supervised_rows] = self.argmax >= 0
        return mask.view(batch, length, 1)

    @property
    def target_probs(self) -> Tensor:
        """[B, T, K] fp32 as the reference holds it, zero where nothing was sent. For tests and small batches."""
        batch, length = self.tokens.shape
        probs_NK = self.targets.probs(slice(None))
        dense = probs_NK.new_zeros(batch * length, self.targets.draft_vocab_size)
        dense[self.supervised_rows] = probs_NK
        return dense.view(batch, length, -1)
