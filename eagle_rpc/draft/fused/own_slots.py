"""Keys and values of later TTT steps at a query's own slot, merged into causal attention.

Let o be the causal output, l its log-sum, and s_j the scaled score against the key of step j. Then l' =
logaddexp(l, s_1, .., s_k) and o' = exp(l - l') o + sum_j exp(s_j - l') v_j (the merge of FlashAttention's
blocks).
Legend: B batch, T sequence, N = B T slots, Q query heads, J key heads, G query heads of one key head, D head
width, S steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_rpc.draft.fused.formulas import widened


@dataclass(frozen=True, kw_only=True, slots=True)
class StepHeads:
    """Inputs and outputs of one step's attention. The heads of a slot are adjacent in memory."""

    step: int
    scale: float  # of scores
    queries: Tensor  # [N, Q, D]
    keys: Tensor  # [S, N, J, D], filled up to `step`
    values: Tensor  # [S, N, J, D]
    out: Tensor  # [N, Q, D]
    log_sums: Tensor  # [B, Q, T] or, packed, [1, Q, N]; fp32, fp64 for fp64 heads


def merge(heads: StepHeads) -> None:
    """Extends `out` and `log_sums` in place from step 0's keys to later steps' at the same slot."""
    if heads.step == 0:
        return
    if heads.out.is_cuda:
        # Only torch for CUDA comes with Triton.
        from eagle_rpc.draft.fused import triton_own_slots

        triton_own_slots.merge(heads)
        return
    queries_NJGD, out_NJGD = _grouped(heads.queries, heads), _grouped(heads.out, heads)
    causal_NJG1 = _by_slot(heads)
    scores = [heads.scale * _dot(queries_NJGD, heads.keys[later]) for later in range(1, heads.step + 1)]
    log_sums_NJG1 = torch.cat((causal_NJG1, *scores), dim=-1).logsumexp(dim=-1, keepdim=True)
    merged_NJGD = (causal_NJG1 - log_sums_NJG1).exp() * widened(out_NJGD)
    for later, scores_NJG1 in enumerate(scores, start=1):
        merged_NJGD += (scores_NJG1 - log_sums_NJG1).exp() * widened(heads.values[later]).unsqueeze(2)
    heads.out.copy_(merged_NJGD.flatten(1, 2))
    heads.log_sums.transpose(1, 2).copy_(log_sums_NJG1.reshape(heads.log_sums.transpose(1, 2).shape))


def merge_backward(
    heads: StepHeads, out_grads_NQD: Tensor, query_grads_NQD: Tensor, key_value_grads: tuple[Tensor, Tensor]
) -> None:
    """Adds the gradients through later steps to those of queries [N, Q, D], keys and values [S, N, J, D]."""
    if heads.step == 0:
        return
    if heads.out.is_cuda:
        from eagle_rpc.draft.fused import triton_own_slots

        triton_own_slots.merge_backward(heads, out_grads_NQD, query_grads_NQD, key_value_grads)
        return
    key_grads_SNJD, value_grads_SNJD = key_value_grads
    queries_NJGD, out_grads_NJGD = _grouped(heads.queries, heads), _grouped(out_grads_NQD, heads)
    log_sums_NJG1 = _by_slot(heads)
    expected_NJG1 = (widened(out_grads_NJGD) * widened(_grouped(heads.out, heads))).sum(-1, keepdim=True)
    for later in range(1, heads.step + 1):
        shares_NJG1 = (heads.scale * _dot(queries_NJGD, heads.keys[later]) - log_sums_NJG1).exp()
        value_gap_NJG1 = _dot(out_grads_NJGD, heads.values[later]) - expected_NJG1
        score_grads_NJG1 = heads.scale * shares_NJG1 * value_gap_NJG1
        query_grads_NQD += (score_grads_NJG1 * widened(heads.keys[later]).unsqueeze(2)).flatten(1, 2)
        key_grads_SNJD[later] += (score_grads_NJG1 * widened(queries_NJGD)).sum(dim=2)
        value_grads_SNJD[later] += (shares_NJG1 * widened(out_grads_NJGD)).sum(dim=2)


def _grouped(heads_NQD: Tensor, heads: StepHeads) -> Tensor:
    """[N, J, G, D]"""
    return heads_NQD.unflatten(1, (heads.keys.shape[2], -1))


def _by_slot(heads: StepHeads) -> Tensor:
    """A copy of the log-sums as [N, J, G, 1]."""
    return heads.log_sums.transpose(1, 2).reshape(len(heads.queries), heads.keys.shape[2], -1, 1)


def _dot(heads_NJGD: Tensor, keys_NJD: Tensor) -> Tensor:
    """[N, J, G, 1]"""
    return (widened(heads_NJGD) * widened(keys_NJD).unsqueeze(2)).sum(-1, keepdim=True)
