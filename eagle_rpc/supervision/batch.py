"""One batch of decoded supervision, as a trainer uses it.

Legend: B batch, T sequence, W width of all captured states, K draft vocab, N supervised rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from eagle_rpc.supervision.encodings import DraftTargets
from eagle_rpc.supervision.tensors import shift_left
from eagle_rpc.supervision.tokens import TokenBatch, shifted_loss_mask


@dataclass(kw_only=True, slots=True)
class Eagle3TargetBatch:
    """Supervision of one `TokenBatch`; tensors are on the trainer's device, but `tokens` where they were.

    Tokens on the CPU let the draft decide by their masks what to compute, without a wait for a GPU.

    Row r = b * T + t of the flattened batch is judged by the target's output at position t + 1 of sequence b.
    """

    tokens: TokenBatch  # as sent, not shifted
    aux_hidden_states: Tensor  # [B, T, W] target dtype, zero at padding
    supervised_rows: Tensor  # [N] int64, flat rows with a target distribution, ascending
    targets: DraftTargets  # of those N rows
    log_normalizer: Tensor  # [N] fp32, logsumexp over the full vocabulary
    argmax: Tensor  # [N] int64, draft id of the target's most likely token, -1 outside the draft vocab
    input_ids: Tensor = field(init=False)  # [B, T] int64, shifted left
    loss_mask: Tensor = field(init=False)  # [B, T] bool, shifted left
    segment_ids: Tensor | None = field(init=False)  # [B, T] int64, those of the tokens

    def __post_init__(self) -> None:
        tokens = self.tokens.to(self.aux_hidden_states.device)
        self.input_ids, self.segment_ids = shift_left(tokens.input_ids), tokens.segment_ids
        self.loss_mask = shifted_loss_mask(tokens)

    def map_large(self, function: Callable[[Tensor], Tensor]) -> "Eagle3TargetBatch":
        """The same batch with `function` applied to its large tensors: aux states and the targets' values."""
        targets = replace(self.targets, values=function(self.targets.values))
        return replace(self, aux_hidden_states=function(self.aux_hidden_states), targets=targets)

    @property
    def position_mask(self) -> Tensor:
        """[B, T, 1] bool: supervised, and the target's most likely token is in the draft vocabulary."""
        batch, length = self.tokens.shape
        mask = torch.zeros(batch * length, dtype=torch.bool, device=self.supervised_rows.device)
        mask[self.supervised_rows] = self.argmax >= 0
        return mask.view(batch, length, 1)

    @property
    def target_probs(self) -> Tensor:
        """[B, T, K] fp32 as the reference has it, zero at rows that were not sent. For small batches."""
        batch, length = self.tokens.shape
        probs_NK = self.targets.probs(slice(None))
        dense = probs_NK.new_zeros(batch * length, probs_NK.shape[1])
        dense[self.supervised_rows] = probs_NK
        return dense.view(batch, length, -1)
