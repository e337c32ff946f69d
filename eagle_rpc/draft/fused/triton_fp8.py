"""Triton kernels of `formulas.to_fp8`.

Legend: N rows, W width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles that run at the speed of the memory of an H100, with four warps.
_LARGEST_TILE = {"ROWS": 4, "COLUMNS": 2048}
_ROUNDING_TILE = {"ROWS": 64, "COLUMNS": 128}


@triton.jit
def _largest_kernel(x, largest, num_rows, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows[:, None] < num_rows) & (columns[None, :] < width)
    tile = tl.load(x + rows[:, None] * stride + columns[None, :], mask, other=0.0).to(tl.float32)
    # The maximum of the hardware drops NaN, which has to reach the loss.
    tile = tl.where(tile == tile, tl.abs(tile), float("inf"))
    tl.atomic_max(largest, tl.max(tl.max(tile, axis=1), axis=0))


@triton.jit
def _rounding_kernel(
    x, largest, out, scale, num_rows, width, padded_rows, stride, limit,
    TURNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    mask = (rows[:, None] < num_rows) & (columns[None, :] < width)
    tile = tl.load(x + rows[:, None] * stride + columns[None, :], mask, other=0.0).to(tl.float32)
    found = tl.load(largest)
    step = tl.where(found > 0.0, found / limit, 1.0)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale, step)
    rounded = (tile / step).to(out.dtype.element_ty)
    if TURNED:
        places = columns[:, None] * padded_rows + rows[None, :]
        tl.store(out + places, tl.trans(rounded), (columns[:, None] < width) & (rows[None, :] < padded_rows))
    else:
        tl.store(out + rows[:, None] * width + columns[None, :], rounded, mask)


def to_fp8(x_NW: Tensor, dtype: torch.dtype, turned: bool) -> tuple[Tensor, Tensor]:
    """`formulas.to_fp8` as two kernels."""
    assert x_NW.stride(1) == 1
    rows, width = x_NW.shape
    padded = rows + -rows % 16 if turned else rows
    shape = (width, padded) if turned else (rows, width)
    out, scale = torch.empty(shape, dtype=dtype, device=x_NW.device), x_NW.new_empty((), dtype=torch.float32)
    largest = x_NW.new_zeros((), dtype=torch.float32)
    sizes, limit = (rows, width), torch.finfo(dtype).max

    def grid(tile: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(padded, tile["ROWS"]), triton.cdiv(width, tile["COLUMNS"])

    _largest_kernel[grid(_LARGEST_TILE)](x_NW, largest, *sizes, x_NW.stride(0), **_LARGEST_TILE)
    _rounding_kernel[grid(_ROUNDING_TILE)](
        x_NW, largest, out, scale, *sizes, padded, x_NW.stride(0), limit, TURNED=turned, **_ROUNDING_TILE
    )
    return out, scale
