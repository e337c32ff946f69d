"""Triton kernels of `own_slots`, under the same names.

One program takes a block of slots and one key head with its group of query heads, and reads keys and values
once.
Legend: N slots of a block, G query heads of one key head, D head width; G and D are rounded up to powers of
two.
"""

import triton
import triton.language as tl
from torch import Tensor

from eagle_rpc.draft.fused.own_slots import StepHeads

# The fastest forward and backward together of ten pairs tried on an H100.
_BLOCK_N, _NUM_WARPS = 8, 4


@triton.jit
def _places(
    num_slots, length, key_heads, group, head_dim,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """This program's slots, offsets of queries and keys within a slot, of log-sums, and masks."""
    slots_N = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    heads_G, columns_D = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    query_heads_G = tl.program_id(1) * group + heads_G
    query_columns_GD = query_heads_G[:, None] * head_dim + columns_D[None, :]
    key_columns_D = tl.program_id(1) * head_dim + columns_D
    sequence_N, position_N = slots_N // length, slots_N % length
    sums_NG = (sequence_N[:, None] * (key_heads * group) + query_heads_G[None, :]) * length
    sums_NG += position_N[:, None]
    mask_NG = (slots_N < num_slots)[:, None] & (heads_G < group)[None, :]
    mask_ND = (slots_N < num_slots)[:, None] & (columns_D < head_dim)[None, :]
    mask_NGD = mask_NG[:, :, None] & mask_ND[:, None, :]
    return slots_N, query_columns_GD, key_columns_D, sums_NG, mask_NG, mask_ND, mask_NGD


@triton.jit
def _own_slots_kernel(
    queries, keys, values, out, log_sums,
    step, num_slots, length, key_heads, scale, query_stride, key_step_stride, key_stride, out_stride,
    group: tl.constexpr, head_dim: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slots_N, columns_GD, key_columns_D, sums_NG, mask_NG, mask_ND, mask_NGD = _places(
        num_slots, length, key_heads, group, head_dim, BLOCK_N, BLOCK_G, BLOCK_D
    )
    key_places_ND = slots_N[:, None] * key_stride + key_columns_D[None, :]
    out_places_NGD = slots_N[:, None, None] * out_stride + columns_GD[None, :, :]
    query_places_NGD = slots_N[:, None, None] * query_stride + columns_GD[None, :, :]

    queries_NGD = tl.load(queries + query_places_NGD, mask_NGD, other=0.0).to(tl.float32) * scale
    merged_NGD = tl.load(out + out_places_NGD, mask_NGD, other=0.0).to(tl.float32)
    log_sums_NG = tl.load(log_sums + sums_NG, mask_NG, other=0.0)
    for _ in range(step):
        # One step at a time: the stride of several steps may not fit 32 bits.
        keys += key_step_stride
        values += key_step_stride
        keys_ND = tl.load(keys + key_places_ND, mask_ND, other=0.0).to(tl.float32)
        values_ND = tl.load(values + key_places_ND, mask_ND, other=0.0).to(tl.float32)
        scores_NG = tl.sum(queries_NGD * keys_ND[:, None, :], axis=2)
        larger_NG = tl.maximum(log_sums_NG, scores_NG)
        summed_NG = larger_NG + tl.log(tl.exp(log_sums_NG - larger_NG) + tl.exp(scores_NG - larger_NG))
        merged_NGD *= tl.exp(log_sums_NG - summed_NG)[:, :, None]
        merged_NGD += tl.exp(scores_NG - summed_NG)[:, :, None] * values_ND[:, None, :]
        log_sums_NG = summed_NG
    tl.store(out + out_places_NGD, merged_NGD.to(out.dtype.element_ty), mask_NGD)
    tl.store(log_sums + sums_NG, log_sums_NG, mask_NG)


@triton.jit
def _own_slots_backward_kernel(
    queries, keys, values, out, out_grads, log_sums, query_grads, key_grads, value_grads,
    step, num_slots, length, key_heads, scale, query_stride, key_step_stride, key_stride, out_stride,
    query_grad_stride, key_grad_step_stride, key_grad_stride,
    group: tl.constexpr, head_dim: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slots_N, columns_GD, key_columns_D, sums_NG, mask_NG, mask_ND, mask_NGD = _places(
        num_slots, length, key_heads, group, head_dim, BLOCK_N, BLOCK_G, BLOCK_D
    )
    key_places_ND = slots_N[:, None] * key_stride + key_columns_D[None, :]
    key_grad_places_ND = slots_N[:, None] * key_grad_stride + key_columns_D[None, :]
    out_places_NGD = slots_N[:, None, None] * out_stride + columns_GD[None, :, :]
    query_places_NGD = slots_N[:, None, None] * query_stride + columns_GD[None, :, :]
    query_grad_places_NGD = slots_N[:, None, None] * query_grad_stride + columns_GD[None, :, :]

    queries_NGD = tl.load(queries + query_places_NGD, mask_NGD, other=0.0).to(tl.float32) * scale
    out_grads_NGD = tl.load(out_grads + out_places_NGD, mask_NGD, other=0.0).to(tl.float32)
    out_NGD = tl.load(out + out_places_NGD, mask_NGD, other=0.0).to(tl.float32)
    log_sums_NG = tl.load(log_sums + sums_NG, mask_NG, other=0.0)
    expected_NG = tl.sum(out_grads_NGD * out_NGD, axis=2)
    query_grads_NGD = tl.load(query_grads + query_grad_places_NGD, mask_NGD, other=0.0).to(tl.float32)
    for _ in range(step):
        keys += key_step_stride
        values += key_step_stride
        key_grads += key_grad_step_stride
        value_grads += key_grad_step_stride
        keys_ND = tl.load(keys + key_places_ND, mask_ND, other=0.0).to(tl.float32)
        values_ND = tl.load(values + key_places_ND, mask_ND, other=0.0).to(tl.float32)
        shares_NG = tl.exp(tl.sum(queries_NGD * keys_ND[:, None, :], axis=2) - log_sums_NG)
        score_grads_NG = shares_NG * (tl.sum(out_grads_NGD * values_ND[:, None, :], axis=2) - expected_NG)
        query_grads_NGD += score_grads_NG[:, :, None] * (scale * keys_ND)[:, None, :]
        key_grads_ND = tl.load(key_grads + key_grad_places_ND, mask_ND, other=0.0).to(tl.float32)
        key_grads_ND += tl.sum(score_grads_NG[:, :, None] * queries_NGD, axis=1)
        tl.store(key_grads + key_grad_places_ND, key_grads_ND.to(key_grads.dtype.element_ty), mask_ND)
        value_grads_ND = tl.load(value_grads + key_grad_places_ND, mask_ND, other=0.0).to(tl.float32)
        value_grads_ND += tl.sum(shares_NG[:, :, None] * out_grads_NGD, axis=1)
        tl.store(value_grads + key_grad_places_ND, value_grads_ND.to(value_grads.dtype.element_ty), mask_ND)
    tl.store(query_grads + query_grad_places_NGD, query_grads_NGD.to(query_grads.dtype.element_ty), mask_NGD)


def merge(heads: StepHeads) -> None:
    grid, sizes, blocks = _launch(heads)
    tensors = (heads.queries, heads.keys, heads.values, heads.out, heads.log_sums)
    _own_slots_kernel[grid](*tensors, *sizes, *_strides(heads), **blocks)


def merge_backward(
    heads: StepHeads, out_grads_NQD: Tensor, query_grads_NQD: Tensor, key_value_grads: tuple[Tensor, Tensor]
) -> None:
    assert out_grads_NQD.stride() == heads.out.stride(), "both are read at the same offsets"
    grid, sizes, blocks = _launch(heads)
    tensors = (heads.queries, heads.keys, heads.values, heads.out, out_grads_NQD, heads.log_sums)
    key_grads_SNJD = key_value_grads[0]
    grad_strides = (query_grads_NQD.stride(0), key_grads_SNJD.stride(0), key_grads_SNJD.stride(1))
    _own_slots_backward_kernel[grid](
        *tensors, query_grads_NQD, *key_value_grads, *sizes, *_strides(heads), *grad_strides, **blocks
    )


def _launch(heads: StepHeads) -> tuple[tuple[int, int], tuple[int | float, ...], dict[str, int]]:
    """Grid, sizes and blocks of both kernels."""
    num_slots, query_heads, head_dim = heads.queries.shape
    key_heads = heads.keys.shape[2]
    group = query_heads // key_heads
    blocks = {
        "group": group,
        "head_dim": head_dim,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_G": triton.next_power_of_2(group),
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "num_warps": _NUM_WARPS,
    }
    sizes = (heads.step, num_slots, heads.log_sums.shape[2], key_heads, heads.scale)
    return (triton.cdiv(num_slots, _BLOCK_N), key_heads), sizes, blocks


def _strides(heads: StepHeads) -> tuple[int, ...]:
    return heads.queries.stride(0), heads.keys.stride(0), heads.keys.stride(1), heads.out.stride(0)
