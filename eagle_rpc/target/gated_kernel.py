"""Triton kernel of `gated_mlp` and `experts`: products with weights, gated before they are stored.

Each streaming multiprocessor works through tiles of the result. The gate and up columns of a tile are one
operand of the matrix units, twice as wide as the tile. The next tile is loaded while this one is gated.
Legend: N rows, P places (rows in the order of their experts), E experts, H hidden, I intermediate width.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Rows of a tile, and columns of all its parts together.
TILE_ROWS = 128
_TILE_COLUMNS, _STEP, _NUM_WARPS = 256, 64, 8


class _Tuning(NamedTuple):
    # Rows, in tiles, of the groups that are computed one after the other: a group fits the second-level cache.
    group: int
    num_stages: int


_DENSE, _GATED_EXPERTS, _EXPERTS = _Tuning(16, 3), _Tuning(8, 4), _Tuning(8, 3)


class ExpertTiles(NamedTuple):
    """Experts by tile of `TILE_ROWS` places, and the tiles in use; int32 on the device of the places."""

    expert_of_tile: Tensor
    num_tiles: Tensor  # [1]


# Without specialisation: the kernel is not compiled again for 1 row and for multiples of 16.
@triton.jit(do_not_specialize=["rows"])
def _product_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, result, expert_of_tile, num_tiles, rows, width, depth, PARTS: tl.constexpr,
    EXPERTS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, STEP: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    tiles_down = tl.load(num_tiles) if EXPERTS else tl.cdiv(rows, TILE_ROWS)
    tiles_across = tl.cdiv(width, TILE_COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, PROGRAMS, flatten=True):
        first_down = tile // (GROUP * tiles_across) * GROUP
        group_height = tl.minimum(tiles_down - first_down, GROUP)
        within = tile % (GROUP * tiles_across)
        down = first_down + within % group_height
        row = down * TILE_ROWS
        column = within // group_height * TILE_COLUMNS
        first_part = tl.load(expert_of_tile + down) * PARTS if EXPERTS else 0
        parts = tl.zeros((TILE_ROWS, PARTS * TILE_COLUMNS), tl.float32)
        for start in range(0, depth, STEP):
            weight_block = weight.load([first_part, column, start]).reshape(PARTS * TILE_COLUMNS, STEP)
            parts = tl.dot(hidden.load([row, start]), weight_block.T, parts)
        if PARTS == 2:
            gate, up = parts.reshape(TILE_ROWS, 2, TILE_COLUMNS).permute(0, 2, 1).split()
            # Rounded at the places where the modules round.
            gate, up = gate.to(result.dtype).to(tl.float32), up.to(result.dtype).to(tl.float32)
            activated = (gate / (1.0 + tl.exp(-gate))).to(result.dtype).to(tl.float32)
            result.store([row, column], (activated * up).to(result.dtype))
        else:
            result.store([row, column], parts.to(result.dtype))


def gated_product(hidden_NH: Tensor, weight_2IH: Tensor) -> Tensor:
    """`silu(hidden @ weight[0].T) * (hidden @ weight[1].T)`: [N, I] in the dtype of both, bf16 or fp16.

    H and I must be multiples of 8, and both tensors contiguous.
    """
    return _product(hidden_NH, weight_2IH, 2, None, _DENSE)


def gated_product_of_experts(hidden_PH: Tensor, weight_EIH: Tensor, tiles: ExpertTiles) -> Tensor:
    """`gated_product` of each place with its tile's expert: [P, I]; of `weight` [E, 2 I, H] gate stands first.

    Places of tiles beyond `tiles.num_tiles` are not written.
    """
    experts, width, depth = weight_EIH.shape
    halves = weight_EIH.view(2 * experts, width // 2, depth)
    return _product(hidden_PH, halves, 2, tiles, _GATED_EXPERTS)


def product_of_experts(gated_PI: Tensor, weight_EHI: Tensor, tiles: ExpertTiles) -> Tensor:
    """`gated @ weight[expert].T` of each place with its tile's expert: [P, H], else as above."""
    return _product(gated_PI, weight_EHI, 1, tiles, _EXPERTS)


def _product(
    hidden_NH: Tensor, weight: Tensor, parts: int, tiles: ExpertTiles | None, tuning: _Tuning
) -> Tensor:
    (rows, depth), width = hidden_NH.shape, weight.shape[1]
    result = hidden_NH.new_empty(rows, width)
    if not rows:
        return result
    columns = _TILE_COLUMNS // parts
    descriptors = (
        TensorDescriptor.from_tensor(hidden_NH, [TILE_ROWS, _STEP]),
        TensorDescriptor.from_tensor(weight, [parts, columns, _STEP]),
        TensorDescriptor.from_tensor(result, [TILE_ROWS, columns]),
    )
    programs = _multiprocessors(hidden_NH.device)
    # Triton launches on the current device, which may not be that of the tensors.
    with torch.cuda.device_of(hidden_NH):
        _product_kernel[(programs,)](
            *descriptors, *(tiles or (None, None)), rows, width, depth, parts, tiles is not None, TILE_ROWS,
            columns, _STEP, tuning.group, programs, num_stages=tuning.num_stages, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return result


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
