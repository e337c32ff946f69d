"""Triton kernels of `formulas`, under the same names.

Legend: N slots, H hidden, I feed-forward width, B batch, T sequence, E tokens, S steps, P width of queries,
keys and values side by side, A heads in P, D half of a head's width. Blocks are rounded up to powers
of two and masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagle_rpc.draft.fused.triton_fp8 import to_fp8 as to_fp8
from eagle_rpc.draft.fused.triton_losses import judge_rows_ as judge_rows_
from eagle_rpc.draft.rope import RopeTables

_BLOCK = 1024  # columns of a program where columns are independent
_HEADS_OF_A_PROGRAM = 16
# Programs that divide the slots among them and keep partial sums: four for each of the 132 multiprocessors of
# an H100.
_PROGRAMS_OF_SUMS = 528


@triton.jit
def _rms_norm_kernel(x, weight, out, width, eps, BLOCK: tl.constexpr):
    columns_H = tl.arange(0, BLOCK)
    mask_H = columns_H < width
    places_H = tl.program_id(0).to(tl.int64) * width + columns_H
    x_H = tl.load(x + places_H, mask_H, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x_H * x_H) / width + eps)
    weight_H = tl.load(weight + columns_H, mask_H, other=0.0).to(tl.float32)
    tl.store(out + places_H, (weight_H * x_H * inverse_rms).to(out.dtype.element_ty), mask_H)


def rms_norm(x_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    slots, width = x_NH.shape
    out_NH = torch.empty_like(x_NH)
    block, num_warps = _whole_width_block(width)
    _rms_norm_kernel[(slots,)](x_NH, weight_H, out_NH, width, eps, BLOCK=block, num_warps=num_warps)
    return out_NH


@triton.jit
def _rms_norm_backward_kernel(
    normed_grads, x, weight, passed, out, weight_grads, num_slots, width, eps,
    HAS_PASSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns_H = tl.arange(0, BLOCK)
    mask_H = columns_H < width
    weight_H = tl.load(weight + columns_H, mask_H, other=0.0).to(tl.float32)
    weight_grad_H = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in range(program, num_slots, tl.num_programs(0)):
        places_H = slot * width + columns_H
        x_H = tl.load(x + places_H, mask_H, other=0.0).to(tl.float32)
        grad_H = tl.load(normed_grads + places_H, mask_H, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(x_H * x_H) / width + eps)
        scaled_H = x_H * inverse_rms
        weighted_H = grad_H * weight_H
        x_grad_H = inverse_rms * (weighted_H - scaled_H * (tl.sum(weighted_H * scaled_H) / width))
        if HAS_PASSED:
            x_grad_H += tl.load(passed + places_H, mask_H, other=0.0).to(tl.float32)
        weight_grad_H += grad_H * scaled_H
        tl.store(out + places_H, x_grad_H.to(out.dtype.element_ty), mask_H)
        tl.store(x + places_H, (weight_H * scaled_H).to(x.dtype.element_ty), mask_H)
    tl.store(weight_grads + program * width + columns_H, weight_grad_H, mask_H)


def rms_norm_backward(
    normed_grad_NH: Tensor,
    x_NH: Tensor,
    norm: tuple[Tensor, float],
    weight_grad_H: Tensor,
    passed_NH: Tensor | None,
    out_NH: Tensor,
) -> None:
    """`formulas.rms_norm_backward` as one kernel."""
    assert normed_grad_NH.is_contiguous() and x_NH.is_contiguous() and out_NH.is_contiguous()
    assert x_NH.numel() < 2**31, "offsets are 32 bits wide"
    slots, width = x_NH.shape
    weight_H, eps = norm
    programs = min(slots, _PROGRAMS_OF_SUMS)
    partial_sums = torch.empty(programs, width, dtype=torch.float32, device=x_NH.device)
    block, num_warps = _whole_width_block(width)
    has_passed = passed_NH is not None
    tensors = (normed_grad_NH, x_NH, weight_H, passed_NH if has_passed else x_NH, out_NH, partial_sums)
    _rms_norm_backward_kernel[(programs,)](
        *tensors, slots, width, eps, HAS_PASSED=has_passed, BLOCK=block, num_warps=num_warps
    )
    weight_grad_H.add_(partial_sums.sum(dim=0))


@triton.jit
def _swiglu_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    columns_I = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_I = columns_I < width
    gates = gate_up + slot * 2 * width + columns_I
    gate_I = tl.load(gates, mask_I).to(tl.float32)
    up_I = tl.load(gates + width, mask_I).to(tl.float32)
    gated_I = gate_I * tl.sigmoid(gate_I) * up_I
    tl.store(out + slot * width + columns_I, gated_I.to(out.dtype.element_ty), mask_I)


def swiglu(gate_up_NI2: Tensor) -> Tensor:
    slots, width = gate_up_NI2.shape[0], gate_up_NI2.shape[1] // 2
    out_NI = gate_up_NI2.new_empty(slots, width)
    _swiglu_kernel[slots, triton.cdiv(width, _BLOCK)](gate_up_NI2, out_NI, width, BLOCK=_BLOCK)
    return out_NI


@triton.jit
def _swiglu_backward_kernel(gated_grads, gate_up, gated_out, width, BLOCK: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    columns_I = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_I = columns_I < width
    gates, gated = gate_up + slot * 2 * width + columns_I, slot * width + columns_I
    grad_I = tl.load(gated_grads + gated, mask_I).to(tl.float32)
    gate_I = tl.load(gates, mask_I).to(tl.float32)
    up_I = tl.load(gates + width, mask_I).to(tl.float32)
    sigmoid_I = tl.sigmoid(gate_I)
    silu_I = gate_I * sigmoid_I
    kind = gated_out.dtype.element_ty
    tl.store(gated_out + gated, (silu_I * up_I).to(kind), mask_I)
    tl.store(gates, (grad_I * up_I * (sigmoid_I + silu_I * (1 - sigmoid_I))).to(kind), mask_I)
    tl.store(gates + width, (grad_I * silu_I).to(kind), mask_I)


def swiglu_backward(gated_grad_NI: Tensor, gate_up_NI2: Tensor, gated_out_NI: Tensor) -> None:
    assert gated_grad_NI.is_contiguous() and gate_up_NI2.is_contiguous() and gated_out_NI.is_contiguous()
    slots, width = gated_out_NI.shape
    grid = (slots, triton.cdiv(width, _BLOCK))
    _swiglu_backward_kernel[grid](gated_grad_NI, gate_up_NI2, gated_out_NI, width, BLOCK=_BLOCK)


@triton.jit
def _heads_of_program(length, heads, half, HEADS: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's slot, sequence, position and heads, offsets of their first halves, and the mask."""
    slot = tl.program_id(0).to(tl.int64)
    heads_A = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns_D = tl.arange(0, BLOCK_D)
    places_AD = heads_A[:, None] * 2 * half + columns_D[None, :]
    mask_AD = (heads_A < heads)[:, None] & (columns_D < half)[None, :]
    return slot, slot // length, slot % length, heads_A, places_AD, mask_AD


@triton.jit
def _angles(cos, sin, sequence, position, table_stride, half, heads_A, rotated_heads, BLOCK_D: tl.constexpr):
    """Cosines and sines [A, D] of a slot; heads from `rotated_heads` on are not rotated."""
    columns_D = tl.arange(0, BLOCK_D)
    places_D = sequence * table_stride + position * half + columns_D
    cos_D = tl.load(cos + places_D, columns_D < half, other=0.0)
    sin_D = tl.load(sin + places_D, columns_D < half, other=0.0)
    rotated_A1 = (heads_A < rotated_heads)[:, None]
    return tl.where(rotated_A1, cos_D[None, :], 1.0), tl.where(rotated_A1, sin_D[None, :], 0.0)


@triton.jit
def _add_and_rotate_kernel(
    hidden_part, embed_part, cos, sin, out, embed_stride, table_stride, length, heads, half, rotated_heads,
    HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot, sequence, position, heads_A, places_AD, mask_AD = _heads_of_program(
        length, heads, half, HEADS, BLOCK_D
    )
    cos_AD, sin_AD = _angles(
        cos, sin, sequence, position, table_stride, half, heads_A, rotated_heads, BLOCK_D
    )
    width = 2 * half * heads
    hidden_part += slot * width + places_AD
    embed_part += sequence * embed_stride + position * width + places_AD
    out += slot * width + places_AD
    first_AD = tl.load(hidden_part, mask_AD).to(tl.float32) + tl.load(embed_part, mask_AD).to(tl.float32)
    second_AD = tl.load(hidden_part + half, mask_AD).to(tl.float32)
    second_AD += tl.load(embed_part + half, mask_AD).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out, (first_AD * cos_AD - second_AD * sin_AD).to(kind), mask_AD)
    tl.store(out + half, (second_AD * cos_AD + first_AD * sin_AD).to(kind), mask_AD)


def add_and_rotate(
    hidden_part_BTP: Tensor, embed_part_BTP: Tensor, tables: RopeTables, value_width: int, out_BTP: Tensor
) -> None:
    assert hidden_part_BTP.is_contiguous() and out_BTP.is_contiguous()
    assert embed_part_BTP.stride(1) == out_BTP.shape[-1]
    grid, table_stride, sizes, blocks = _rotation(tables, out_BTP, value_width)
    tensors = (hidden_part_BTP, embed_part_BTP, *tables, out_BTP)
    _add_and_rotate_kernel[grid](*tensors, embed_part_BTP.stride(0), table_stride, *sizes, **blocks)


@triton.jit
def _rotate_back_kernel(
    query_grads, key_value_grads, cos, sin, out, query_heads, table_stride, length, heads, half,
    rotated_heads, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot, sequence, position, heads_A, places_AD, mask_AD = _heads_of_program(
        length, heads, half, HEADS, BLOCK_D
    )
    cos_AD, sin_AD = _angles(
        cos, sin, sequence, position, table_stride, half, heads_A, rotated_heads, BLOCK_D
    )
    query_width, width = 2 * half * query_heads, 2 * half * heads
    of_query_AD = mask_AD & (heads_A < query_heads)[:, None]
    of_key_AD = mask_AD & (heads_A >= query_heads)[:, None]
    query_grads += slot * query_width + places_AD
    key_value_grads += slot * (width - query_width) + places_AD - query_width
    first_AD = tl.load(query_grads, of_query_AD, other=0.0).to(tl.float32)
    first_AD += tl.load(key_value_grads, of_key_AD, other=0.0).to(tl.float32)
    second_AD = tl.load(query_grads + half, of_query_AD, other=0.0).to(tl.float32)
    second_AD += tl.load(key_value_grads + half, of_key_AD, other=0.0).to(tl.float32)
    out += slot * width + places_AD
    kind = out.dtype.element_ty
    tl.store(out, (first_AD * cos_AD + second_AD * sin_AD).to(kind), mask_AD)
    tl.store(out + half, (second_AD * cos_AD - first_AD * sin_AD).to(kind), mask_AD)


def rotate_back(
    query_grad_BTQ: Tensor, key_value_grad_BTJ2: Tensor, tables: RopeTables, out_BTP: Tensor
) -> None:
    assert query_grad_BTQ.is_contiguous() and key_value_grad_BTJ2.is_contiguous() and out_BTP.is_contiguous()
    grid, table_stride, sizes, blocks = _rotation(tables, out_BTP, key_value_grad_BTJ2.shape[-1] // 2)
    query_heads = query_grad_BTQ.shape[-1] // (2 * tables[0].shape[-1])
    tensors = (query_grad_BTQ, key_value_grad_BTJ2, *tables, out_BTP)
    _rotate_back_kernel[grid](*tensors, query_heads, table_stride, *sizes, **blocks)


def _rotation(
    tables: RopeTables, out_BTP: Tensor, value_width: int
) -> tuple[tuple[int, int], int, tuple[int, ...], dict[str, int]]:
    """Grid, batch stride of the tables, sizes and blocks of both rotations."""
    batch, length, width = out_BTP.shape
    half = tables[0].shape[-1]
    heads, rotated_heads = width // (2 * half), (width - value_width) // (2 * half)
    grid = (batch * length, triton.cdiv(heads, _HEADS_OF_A_PROGRAM))
    table_stride = tables[0].stride(0) if len(tables[0]) > 1 else 0
    blocks = {"HEADS": _HEADS_OF_A_PROGRAM, "BLOCK_D": triton.next_power_of_2(half)}
    return grid, table_stride, (length, heads, half, rotated_heads), blocks


@triton.jit
def _sum_readers_kernel(steps, readers, out, num_steps, slots, tokens, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns_P = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_P = columns_P < width
    sum_P = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(num_steps):
        slot = tl.load(readers + step * tokens + token)
        offset = (step * slots + slot) * width
        sum_P += tl.load(steps + offset + columns_P, mask_P & (slot >= 0), other=0.0).to(tl.float32)
    tl.store(out + token * width + columns_P, sum_P.to(out.dtype.element_ty), mask_P)


def sum_readers(steps_SNP: Tensor, readers_SE: Tensor) -> Tensor:
    assert steps_SNP.is_contiguous() and readers_SE.is_contiguous() and readers_SE.dtype is torch.int64
    steps, slots, width = steps_SNP.shape
    tokens = readers_SE.shape[1]
    out_EP = steps_SNP.new_empty(tokens, width)
    grid = (tokens, triton.cdiv(width, _BLOCK))
    _sum_readers_kernel[grid](steps_SNP, readers_SE, out_EP, steps, slots, tokens, width, BLOCK=_BLOCK)
    return out_EP


def _whole_width_block(width: int) -> tuple[int, int]:
    """Block and warps of a program that holds the whole width of a slot."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))
