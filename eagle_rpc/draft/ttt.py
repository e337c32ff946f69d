"""Training-time test (TTT): the draft unrolled over its own outputs, as in decoding.

Step k at slot t reads the id of token t + k + 1 and the draft's own output of step k - 1; row t + k judges
it.
Legend: B batch, T sequence, N rows (in `_unroll` slots B T), L live slots, S steps, H hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_rpc.draft.chunked_loss import JudgedRows, head_loss
from eagle_rpc.draft.live_slots import LiveSlots, index_among
from eagle_rpc.draft.model import Eagle3Draft
from eagle_rpc.supervision import Eagle3TargetBatch, shift_left
from eagle_rpc.supervision.segments import chat_starts, positions_from


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The quantity that training minimises: `sum_k w_k * (losses of step k) / max(1, denominators[k])`.

    `denominators` [S] are `count_rows` summed over all batches of the optimiser step on all trainers. So the
    losses of those batches add up to one mean over all their rows, however the work is split.
    """

    steps: int  # S
    step_decay: float  # w_k is proportional to `step_decay ** k`; the weights sum to 1
    weights: Tensor | None = None  # [S] fp32 instead of them, with sum 1; its values may change between steps
    loss: str = "soft_cross_entropy"  # one of `losses.LOSSES`
    kl_share: float = 0.0  # of a loss that mixes

    def rows_of(self, batch: Eagle3TargetBatch, valid_NS: Tensor, denominators_S: Tensor) -> JudgedRows:
        """The rows of `judged_slots`, with the factor of each row's loss at each step."""
        weights_S = self.weights
        if weights_S is None:
            weights_S = step_weights(self.steps, self.step_decay, denominators_S.device)
        return JudgedRows(
            targets=batch.targets,
            log_normalizer=batch.log_normalizer,
            loss=self.loss,
            kl_share=self.kl_share,
            coefficients=valid_NS * (weights_S / denominators_S.clamp(min=1)),
        )


@dataclass(kw_only=True, slots=True)
class TTTResult:
    """The objective and its figures. All but `loss` are without gradient and may be added over batches."""

    loss: Tensor  # scalar fp32
    loss_sums: Tensor  # [S] fp32, sums of losses without weights
    rows: Tensor  # [S] int64, rows in those sums
    correct: Tensor  # [S] int64, rows where draft and target have the same most likely token
    accepted: Tensor  # [S] int64, slots whose steps 0..i were all correct
    drafts: Tensor  # [S] int64, slots whose rows t..t+i are all in the loss mask


def simulated_accept_length(accepted: Tensor, drafts: Tensor) -> Tensor:
    """Tokens per target call if each slot began a draft, with the target's own token; scalar fp64."""
    return 1 + (accepted.double() / drafts.clamp(min=1)).sum()


def step_weights(steps: int, step_decay: float, device: torch.device | None = None) -> Tensor:
    """Weight of each step in the objective, proportional to `step_decay ** k`, with sum 1; [S] fp32."""
    weights_S = step_decay ** torch.arange(steps, dtype=torch.float32, device=device)
    return weights_S / weights_S.sum()


def count_rows(batch: Eagle3TargetBatch, steps: int) -> Tensor:
    """Rows that judge each step, [S] int64. It does not depend on the draft."""
    _, valid_NS = judged_slots(batch, steps)
    return valid_NS.sum(dim=0)


def ttt_loss(
    draft: Eagle3Draft, batch: Eagle3TargetBatch, objective: Objective, denominators_S: Tensor
) -> TTTResult:
    """The objective of one batch, differentiable by the draft's parameters."""
    live = LiveSlots.of(batch.tokens, objective.steps).to(batch.input_ids.device)
    outputs_SLH = _unroll(draft, batch, live, objective.steps)
    slots_NS, valid_NS = judged_slots(batch, objective.steps)
    pairs = zip(outputs_SLH, index_among(live.places, slots_NS).unbind(1), strict=True)
    judged_NSH = torch.stack([output_LH[judged_N] for output_LH, judged_N in pairs], dim=1)
    rows = objective.rows_of(batch, valid_NS, denominators_S)
    total, losses_NS, predicted_NS = head_loss(draft.norm(judged_NSH), draft.lm_head.weight, rows)
    return result_of(batch, total, losses_NS, predicted_NS, slots_NS, valid_NS)


class ReferenceStep:
    """The objective and its gradients for one micro-batch at a time, by autograd over `ttt_loss`.

    Matrix products run in the dtype `autocast`; None: in the dtype of the weights.
    """

    reads_draft = True
    """Whether it reads the draft's own parameters, which then have to be whole, or keeps copies of them."""

    def __init__(self, draft: Eagle3Draft, objective: Objective, *, autocast: torch.dtype | None) -> None:
        self._draft, self._objective, self._autocast = draft, objective, autocast

    def add_gradients(self, batch: Eagle3TargetBatch, denominators: Tensor) -> TTTResult:
        """The objective, without graph; adds its gradients to those of the draft's parameters."""
        result = self._loss(batch, denominators)
        result.loss.backward()
        return result

    @torch.no_grad()
    def judge(self, batch: Eagle3TargetBatch, denominators: Tensor) -> TTTResult:
        """The objective alone."""
        return self._loss(batch, denominators)

    def refresh_weights(self) -> None:
        """Called after the draft's weights have changed; this step keeps no copies."""

    def _loss(self, batch: Eagle3TargetBatch, denominators: Tensor) -> TTTResult:
        device_type, enabled = batch.input_ids.device.type, self._autocast is not None
        with torch.autocast(device_type, dtype=self._autocast, enabled=enabled):
            return ttt_loss(self._draft, batch, self._objective, denominators)


def result_of(
    batch: Eagle3TargetBatch,
    loss: Tensor,
    losses_NS: Tensor,
    predicted_NS: Tensor,
    slots_NS: Tensor,
    valid_NS: Tensor,
) -> TTTResult:
    """The result from each row's losses and most likely draft ids at the slots of `judged_slots`."""
    correct_NS = valid_NS & (predicted_NS == batch.argmax.unsqueeze(1))
    accepted_S, drafts_S = _simulate_decoding(batch, slots_NS, correct_NS)
    return TTTResult(
        loss=loss,
        loss_sums=(losses_NS * valid_NS).sum(dim=0),
        rows=valid_NS.sum(dim=0),
        correct=correct_NS.sum(dim=0),
        accepted=accepted_S,
        drafts=drafts_S,
    )


def _unroll(draft: Eagle3Draft, batch: Eagle3TargetBatch, live: LiveSlots, steps: int) -> list[Tensor]:
    """Outputs before the norm [L, H] of each step at the live slots."""
    memory = draft.unroll_memory(live)
    positions_N = positions_of(batch).expand_as(batch.input_ids).flatten()
    ids_BT, hidden = batch.input_ids, draft.fuse(batch.aux_hidden_states.flatten(0, 1)[None])
    outputs_SLH = []
    # Step 0 reads all slots, for their keys and values.
    slots: Tensor | slice = slice(None)
    for step in range(steps):
        ids, positions = ids_BT.flatten()[slots], positions_N[slots] + step
        output = draft.advance(ids[None], hidden, positions[None], memory)
        outputs_SLH.append(output[0])
        hidden, ids_BT, slots = draft.carried(output), shift_left(ids_BT), live.places
    return outputs_SLH


def positions_of(batch: Eagle3TargetBatch) -> Tensor:
    """Rotary positions of step 0, [B or 1, T]; they restart with every packed chat."""
    if batch.segment_ids is None:
        return torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None]
    return positions_from(chat_starts(batch.segment_ids))


def judged_slots(batch: Eagle3TargetBatch, steps: int) -> tuple[Tensor, Tensor]:
    """The flat slot b * T + t that each row judges at each step, and whether there is one; [N, S] each.

    Where there is none, the slot is an arbitrary slot of the batch.
    """
    rows_N1 = batch.supervised_rows.unsqueeze(1)
    steps_1S = torch.arange(steps, device=rows_N1.device)[None]
    valid_NS = rows_N1 % batch.input_ids.shape[1] >= steps_1S
    slots_NS = (rows_N1 - steps_1S).clamp(min=0)
    if batch.segment_ids is not None:
        segments = batch.segment_ids.flatten()
        # Row r judges the guess of token r + 1, which exists: a row is never the last position of its
        # sequence.
        valid_NS &= segments[rows_N1 + 1] == segments[slots_NS]
    return slots_NS, valid_NS


def _simulate_decoding(
    batch: Eagle3TargetBatch, slots_NS: Tensor, correct_NS: Tensor
) -> tuple[Tensor, Tensor]:
    """`accepted` and `drafts` of `TTTResult`."""
    steps = slots_NS.shape[1]
    inside_BT = batch.loss_mask
    flat_correct = torch.zeros(steps, inside_BT.numel(), dtype=torch.int32, device=inside_BT.device)
    # Added, not assigned: a row without a slot at a step names the slot of another row, and adds 0.
    flat_correct.scatter_add_(1, slots_NS.t(), correct_NS.t().int())
    accepted_S = flat_correct.cumprod(dim=0).sum(dim=1)
    drafts_S, possible_BT = [], inside_BT
    for _ in range(steps):
        drafts_S.append(possible_BT.sum())
        inside_BT = shift_left(inside_BT)
        possible_BT = possible_BT & inside_BT
    return accepted_S, torch.stack(drafts_S)
