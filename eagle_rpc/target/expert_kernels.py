"""Triton kernels of `experts`: which place each choice of a token gets, tokens to places and back.

A place is a row in the order of experts. Each expert's places begin a tile, so that a tile meets one expert.
Legend: N tokens, C choices (experts that a token passes), E experts, H hidden, P places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagle_rpc.target.gated_kernel import TILE_ROWS, ExpertTiles

# Choices that are placed at a time, how often in one program, and rows of counts that it reads at a time.
_BLOCK, _REPEATS, _ROWS_OF_COUNTS = 256, 1, 64
# Columns of a row that one program moves.
_COLUMNS = 1024


@triton.jit(do_not_specialize=["choices"])
def _count_kernel(  # type: ignore[no-untyped-def]
    experts, counts, choices, BINS: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr
):  # fmt: skip
    bins, count = tl.arange(0, BINS), tl.zeros((BINS,), tl.int32)
    for repeat in tl.static_range(REPEATS):
        index = (tl.program_id(0) * REPEATS + repeat) * BLOCK + tl.arange(0, BLOCK)
        expert = tl.load(experts + index, index < choices, other=-1).to(tl.int32)
        count += tl.sum((expert[:, None] == bins[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * BINS + bins, count)


@triton.jit(do_not_specialize=["choices", "programs", "most_tiles"])
def _place_kernel(  # type: ignore[no-untyped-def]
    experts, counts, places, expert_of_tile, num_tiles, choices, programs, most_tiles, BINS: tl.constexpr,
    BLOCK: tl.constexpr, REPEATS: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total, before = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        count = tl.load(counts + row[:, None] * BINS + bins[None, :], (row < programs)[:, None], other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((row < program)[:, None], count, 0), 0)
    tiles = tl.cdiv(total, TILE_ROWS)
    ends = tl.cumsum(tiles, 0)
    first = (ends - tiles) * TILE_ROWS + before
    for repeat in tl.static_range(REPEATS):
        index = (program * REPEATS + repeat) * BLOCK + tl.arange(0, BLOCK)
        expert = tl.load(experts + index, index < choices, other=-1).to(tl.int32)
        chosen = (expert[:, None] == bins[None, :]).to(tl.int32)
        place = tl.sum(chosen * (first[None, :] + tl.cumsum(chosen, 0) - 1), 1)
        tl.store(places + index, place, index < choices)
        first += tl.sum(chosen, 0)
    for start in range(program * BLOCK, most_tiles, programs * BLOCK):
        tile = start + tl.arange(0, BLOCK)
        passed = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
        tl.store(expert_of_tile + tile, passed, tile < most_tiles)
    tl.store(num_tiles, tl.max(ends, 0))


@triton.jit
def _spread_kernel(  # type: ignore[no-untyped-def]
    hidden, places, spread, width, CHOICES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    row = tl.load(hidden + token * width + column, inside)
    for choice in tl.static_range(CHOICES):
        place = tl.load(places + token * CHOICES + choice).to(tl.int64)
        tl.store(spread + place * width + column, row, inside)


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    results, places, weights, combined, width, CHOICES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(CHOICES):
        place = tl.load(places + token * CHOICES + choice).to(tl.int64)
        weight = tl.load(weights + token * CHOICES + choice).to(tl.float32)
        total += weight * tl.load(results + place * width + column, inside).to(tl.float32)
    tl.store(combined + token * width + column, total.to(combined.dtype.element_ty), inside)


def place_choices(experts_NC: Tensor, num_experts: int) -> tuple[Tensor, ExpertTiles]:
    """The place of each choice [N, C], int32, and the experts of the tiles.

    Of one expert, earlier choices get earlier places, so equal choices get equal places.
    """
    choices, device = experts_NC.numel(), experts_NC.device
    programs, bins = triton.cdiv(choices, _BLOCK * _REPEATS), triton.next_power_of_2(num_experts)
    most_tiles = min(choices, choices // TILE_ROWS + num_experts)
    counts = torch.empty(programs, bins, dtype=torch.int32, device=device)
    places_NC = torch.empty(experts_NC.shape, dtype=torch.int32, device=device)
    tiles = ExpertTiles(
        torch.empty(most_tiles, dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
    )
    with torch.cuda.device_of(experts_NC):
        _count_kernel[(programs,)](experts_NC, counts, choices, bins, _BLOCK, _REPEATS)
        _place_kernel[(programs,)](
            experts_NC, counts, places_NC, *tiles, choices, programs, most_tiles, bins, _BLOCK, _REPEATS,
            _ROWS_OF_COUNTS, TILE_ROWS, num_warps=8,
        )  # fmt: skip
    return places_NC, tiles


def spread_to_places(hidden_NH: Tensor, places_NC: Tensor, num_tiles: int) -> Tensor:
    """Each token's row at each of its places: [num_tiles * TILE_ROWS, H]; places that no choice has are not written."""
    rows, width = hidden_NH.shape
    spread_PH = hidden_NH.new_empty(num_tiles * TILE_ROWS, width)
    with torch.cuda.device_of(hidden_NH):
        _spread_kernel[_grid(rows, width)](
            hidden_NH, places_NC, spread_PH, width, places_NC.shape[1], _COLUMNS, num_warps=4
        )
    return spread_PH


def combine_places(results_PH: Tensor, places_NC: Tensor, weights_NC: Tensor) -> Tensor:
    """The sum of each token's results by its weights: [N, H] in the dtype of `results`, summed in fp32."""
    rows, width = len(places_NC), results_PH.shape[1]
    combined_NH = results_PH.new_empty(rows, width)
    with torch.cuda.device_of(results_PH):
        _combine_kernel[_grid(rows, width)](
            results_PH, places_NC, weights_NC, combined_NH, width, places_NC.shape[1], _COLUMNS, num_warps=4
        )
    return combined_NH


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, _COLUMNS)
