"""Training-time test: the draft unrolled over its own outputs, as it will be in decoding.

Step k at slot t reads the id of token t + k + 1 and the draft's own output of step k - 1, and is judged against row t + k.
Legend: B batch, T sequence, N supervised rows, S steps, H hidden.
"""

from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from eagle_rpc.draft.attention import UnrollMemory
from eagle_rpc.draft.loss import head_loss
from eagle_rpc.draft.model import Eagle3Draft
from eagle_rpc.supervision import Eagle3TargetBatch, shift_left
from eagle_rpc.supervision.segments import chat_starts, positions_from


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What training minimises: `sum_k w_k * (losses of step k) / max(1, denominators[k])`.

    `denominators` are `count_rows` summed over all batches of the optimiser step on all trainers, so that losses of those
    batches add up to the mean over all of them, however the work is split.
    """

    steps: int  # S
    step_decay: float  # w_k is proportional to `step_decay ** k`, the sum of all is 1
    loss: str = "soft_cross_entropy"  # one of `losses.LOSSES`

    def scales(self, denominators_S: Tensor) -> Tensor:
        """Factor of every step's losses, [S] fp32."""
        return step_weights(self.steps, self.step_decay, denominators_S.device) / denominators_S.clamp(min=1)


@dataclass(kw_only=True, slots=True)
class TTTResult:
    """The objective and what it was made of; all but `loss` are without gradient and add up over batches."""

    loss: Tensor  # scalar fp32
    loss_sums: Tensor  # [S] fp32, unweighted sums of losses
    rows: Tensor  # [S] int64, rows in those sums
    correct: Tensor  # [S] int64, rows where draft and target agree on the most likely token
    accepted: Tensor  # [S] int64, slots whose steps 0..i were all correct
    drafts: Tensor  # [S] int64, slots whose rows t..t+i all lie in the loss mask


def simulated_accept_length(accepted: Tensor, drafts: Tensor) -> Tensor:
    """Tokens per target call if every slot began a draft, the target's own token included; scalar fp64."""
    return 1 + (accepted.double() / drafts.clamp(min=1)).sum()


def step_weights(steps: int, step_decay: float, device: torch.device | None = None) -> Tensor:
    """Weight of each step in the objective, proportional to `step_decay ** k` and of sum 1; [S] fp32."""
    weights_S = step_decay ** torch.arange(steps, dtype=torch.float32, device=device)
    return weights_S / weights_S.sum()


def count_rows(batch: Eagle3TargetBatch, steps: int) -> Tensor:
    """Rows that each step is judged at, [S] int64; known before the draft runs."""
    _, valid_NS = judged_slots(batch, steps)
    return valid_NS.sum(dim=0)


def ttt_loss(
    draft: Eagle3Draft,
    batch: Eagle3TargetBatch,
    *,
    steps: int,
    step_decay: float,
    denominators: Tensor,
    loss: str = "soft_cross_entropy",
) -> TTTResult:
    """The `Objective` of one batch, with the graph that leads to the draft's parameters."""
    outputs_SBTH = _unroll(draft, batch, steps)
    slots_NS, valid_NS = judged_slots(batch, steps)
    judged_NSH = torch.stack(
        [
            output_BTH.flatten(0, 1)[slots_N]
            for output_BTH, slots_N in zip(outputs_SBTH, slots_NS.unbind(1), strict=True)
        ],
        dim=1,
    )
    scales_S = Objective(steps=steps, step_decay=step_decay).scales(denominators)
    total, losses_NS, predicted_NS = head_loss(
        draft.norm(judged_NSH),
        draft.lm_head.weight,
        batch.targets,
        valid_NS * scales_S,
        loss,
        batch.log_normalizer,
    )
    return result_of(batch, total, losses_NS, predicted_NS, slots_NS, valid_NS)


class TTTStep(Protocol):
    """Computes the objective and its gradients for one micro-batch at a time."""

    reads_draft: bool
    """Whether the draft's own parameters have to be whole when a batch is computed, or copies of them are read."""

    def add_gradients(self, batch: Eagle3TargetBatch, denominators: Tensor) -> TTTResult:
        """The objective, whose gradients are added to those of the draft's parameters; no graph is left."""

    def judge(self, batch: Eagle3TargetBatch, denominators: Tensor) -> TTTResult:
        """The objective alone."""

    def refresh_weights(self) -> None:
        """Must be called after the draft's weights have changed."""


class ReferenceStep:
    """The `TTTStep` that autograd makes of `ttt_loss`, with matrix products in `autocast` (null: in the weights' dtype)."""

    reads_draft = True

    def __init__(self, draft: Eagle3Draft, objective: Objective, *, autocast: torch.dtype | None) -> None:
        self._draft, self._objective, self._autocast = draft, objective, autocast

    def add_gradients(self, batch: Eagle3TargetBatch, denominators: Tensor) -> TTTResult:
        result = self._loss(batch, denominators)
        result.loss.backward()
        return result

    @torch.no_grad()
    def judge(self, batch: Eagle3TargetBatch, denominators: Tensor) -> TTTResult:
        return self._loss(batch, denominators)

    def refresh_weights(self) -> None:
        """Nothing to do: the draft's own weights are read."""

    def _loss(self, batch: Eagle3TargetBatch, denominators: Tensor) -> TTTResult:
        with torch.autocast(
            batch.input_ids.device.type, dtype=self._autocast, enabled=self._autocast is not None
        ):
            return ttt_loss(self._draft, batch, denominators=denominators, **asdict(self._objective))


def result_of(
    batch: Eagle3TargetBatch,
    loss: Tensor,
    losses_NS: Tensor,
    predicted_NS: Tensor,
    slots_NS: Tensor,
    valid_NS: Tensor,
) -> TTTResult:
    """Figures of rows judged at `slots` where `valid`, from their losses and the draft's most likely ids."""
    correct_NS = valid_NS & (predicted_NS == batch.argmax.unsqueeze(1))
    accepted_S, drafts_S = _simulate(batch, slots_NS, correct_NS)
    return TTTResult(
        loss=loss,
        loss_sums=(losses_NS * valid_NS).sum(dim=0),
        rows=valid_NS.sum(dim=0),
        correct=correct_NS.sum(dim=0),
        accepted=accepted_S,
        drafts=drafts_S,
    )


def _unroll(draft: Eagle3Draft, batch: Eagle3TargetBatch, steps: int) -> list[Tensor]:
    """Pre-norm outputs [B, T, H] of every step."""
    memory = UnrollMemory(batch.tokens.segment_ids)
    positions_BT = positions_of(batch)
    ids_BT, hidden_BTH = batch.input_ids, draft.fuse(batch.aux_hidden_states)
    outputs_SBTH = []
    for step in range(steps):
        hidden_BTH = draft.advance(ids_BT, hidden_BTH, positions_BT + step, memory)
        outputs_SBTH.append(hidden_BTH)
        ids_BT = shift_left(ids_BT)
    return outputs_SBTH


def positions_of(batch: Eagle3TargetBatch) -> Tensor:
    """Rotary phases of step 0, [B or 1, T]; they restart at every segment."""
    segment_ids = batch.tokens.segment_ids
    if segment_ids is None:
        return torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None]
    return positions_from(chat_starts(segment_ids))


def judged_slots(batch: Eagle3TargetBatch, steps: int) -> tuple[Tensor, Tensor]:
    """For every supervised row and step the flat slot b*T + t that is judged there, and whether there is one; [N, S] each.

    Where there is none the slot is some slot of the batch.
    """
    rows_N1 = batch.supervised_rows.unsqueeze(1)
    steps_1S = torch.arange(steps, device=rows_N1.device)[None]
    valid_NS = rows_N1 % batch.input_ids.shape[1] >= steps_1S
    slots_NS = (rows_N1 - steps_1S).clamp(min=0)
    if batch.tokens.segment_ids is not None:
        segments = batch.tokens.segment_ids.flatten()
        # Row r is judged by token r + 1; a supervised row is never the last of its sequence.
        valid_NS &= segments[rows_N1 + 1] == segments[slots_NS]
    return slots_NS, valid_NS


def _simulate(batch: Eagle3TargetBatch, slots_NS: Tensor, correct_NS: Tensor) -> tuple[Tensor, Tensor]:
    """`accepted` and `drafts` of `TTTResult`."""
    steps = slots_NS.shape[1]
    inside_BT = batch.loss_mask
    flat_correct = torch.zeros(steps, inside_BT.numel(), dtype=torch.int32, device=inside_BT.device)
    # Added, not assigned: rows without a slot at a step point at some other row's slot, and bring zero.
    flat_correct.scatter_add_(1, slots_NS.t(), correct_NS.t().int())
    accepted_S = flat_correct.cumprod(dim=0).sum(dim=1)
    drafts_S, possible_BT = [], inside_BT
    for _ in range(steps):
        drafts_S.append(possible_BT.sum())
        inside_BT = shift_left(inside_BT)
        possible_BT = possible_BT & inside_BT
    return accepted_S, torch.stack(drafts_S)
