"""Triton kernel of `gated_mlp`: one product with gate and up weights, gated before it is stored.

Each streaming multiprocessor works through tiles of the result. The gate and up columns of a tile are one
operand of the matrix units, twice as wide as the tile. The next tile is loaded while this one is gated.
Legend: N rows, H hidden, I intermediate width.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_TILE_ROWS, _TILE_COLUMNS, _STEP = 128, 128, 64
# Rows, in tiles, of the groups that are computed one after the other: a group fits the second-level cache.
_GROUP = 16
_NUM_STAGES, _NUM_WARPS = 3, 8


# Without specialisation: the kernel is not compiled again for 1 row and for multiples of 16.
@triton.jit(do_not_specialize=["rows"])
def _gated_product_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, gated, rows, width, depth, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    tiles_down, tiles_across = tl.cdiv(rows, TILE_ROWS), tl.cdiv(width, TILE_COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, PROGRAMS, flatten=True):
        first_down = tile // (GROUP * tiles_across) * GROUP
        group_height = tl.minimum(tiles_down - first_down, GROUP)
        within = tile % (GROUP * tiles_across)
        row = (first_down + within % group_height) * TILE_ROWS
        column = within // group_height * TILE_COLUMNS
        both = tl.zeros((TILE_ROWS, 2 * TILE_COLUMNS), tl.float32)
        for start in range(0, depth, STEP):
            weight_block = weight.load([0, column, start]).reshape(2 * TILE_COLUMNS, STEP)
            both = tl.dot(hidden.load([row, start]), weight_block.T, both)
        gate, up = both.reshape(TILE_ROWS, 2, TILE_COLUMNS).permute(0, 2, 1).split()
        # Rounded at the places where the modules round.
        gate, up = gate.to(gated.dtype).to(tl.float32), up.to(gated.dtype).to(tl.float32)
        activated = (gate / (1.0 + tl.exp(-gate))).to(gated.dtype).to(tl.float32)
        gated.store([row, column], (activated * up).to(gated.dtype))


def gated_product(hidden_NH: Tensor, weight_2IH: Tensor) -> Tensor:
    """`silu(hidden @ weight[0].T) * (hidden @ weight[1].T)`: [N, I] in the dtype of both, bf16 or fp16.

    H and I must be multiples of 8, and both tensors contiguous.
    """
    (rows, depth), width = hidden_NH.shape, weight_2IH.shape[1]
    gated_NI = hidden_NH.new_empty(rows, width)
    if not rows:
        return gated_NI
    descriptors = (
        TensorDescriptor.from_tensor(hidden_NH, [_TILE_ROWS, _STEP]),
        TensorDescriptor.from_tensor(weight_2IH, [2, _TILE_COLUMNS, _STEP]),
        TensorDescriptor.from_tensor(gated_NI, [_TILE_ROWS, _TILE_COLUMNS]),
    )
    programs = _multiprocessors(hidden_NH.device)
    # Triton launches on the current device, which may not be that of the tensors.
    with torch.cuda.device_of(hidden_NH):
        _gated_product_kernel[(programs,)](
            *descriptors, rows, width, depth, _TILE_ROWS, _TILE_COLUMNS, _STEP, _GROUP, programs,
            num_stages=_NUM_STAGES, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return gated_NI


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
