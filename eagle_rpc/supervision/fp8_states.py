"""Hidden states in float8, each token and layer with a scale of its own.

The largest value of a token and layer becomes the largest of float8_e4m3fn, 448. The other values keep four
significant bits: a relative error of 1/16 at most, and 2^-10 x scale where that is more.
Legend: M states that a target returned, R states that travel, C captured layers, H target hidden, W = C H,
r states of a piece.
"""

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(DTYPE).max
# Quantising passes fp32: 50 MB of it for a piece of three layers of 4096.
_STATES_OF_A_PIECE = 1024


def to_fp8(states_MW: Tensor, places_R: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """States [R, W] in float8 and scales [R, C] fp32 of the states at `places`; equal bits on all devices.

    States that are not finite stay so.
    """
    states_RW = states_MW.new_empty(len(places_R), states_MW.shape[1], dtype=DTYPE)
    scales_RC = states_MW.new_empty(len(places_R), states_MW.shape[1] // hidden_size, dtype=torch.float32)
    for start in range(0, len(places_R), _STATES_OF_A_PIECE):
        piece = slice(start, start + _STATES_OF_A_PIECE)
        states_rCH = states_MW.index_select(0, places_R[piece]).unflatten(1, (-1, hidden_size))
        scales_rC = states_rCH.abs().amax(dim=-1).float() / _LARGEST
        scales_RC[piece] = scales_rC.masked_fill(scales_rC == 0, 1.0)
        states_RW[piece] = (states_rCH.float() / scales_RC[piece, :, None]).to(DTYPE).flatten(1)
    return states_RW, scales_RC


def from_fp8(states_RW: Tensor, scales_RC: Tensor, dtype: torch.dtype) -> Tensor:
    """The states [R, W] in `dtype`: products in fp32, rounded once."""
    states_RCH = states_RW.to(dtype).unflatten(1, (scales_RC.shape[1], -1))
    return torch.mul(states_RCH, scales_RC[:, :, None], out=states_RCH).flatten(1)
