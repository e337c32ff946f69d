"""Live slots: those that some row judges. Training-time test unrolls them alone.

Row t + k judges step k at slot t. So slot t is live if one of the rows t, .., t + S - 1 of its chat may be
supervised. Any other slot only offers its key and value of step 0 to later slots.
Legend: B batch, T sequence, S steps, N = B T slots, L live slots, C chats.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eagle_rpc.supervision import TokenBatch, shift_left, shifted_loss_mask, to_device
from eagle_rpc.supervision.segments import chat_boundaries, chat_starts
from eagle_rpc.supervision.tokens import true_places


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveSlots:
    """The live slots of a batch whose N slots stand in one row, chat after chat; L is at least 1."""

    places: Tensor  # [L] int64, b * T + t, ascending
    chat_lengths: list[int]  # slots of each of C chats; without packing a sequence is one chat
    live_lengths: list[int]  # live slots of each

    @classmethod
    def of(cls, tokens: TokenBatch, steps: int) -> "LiveSlots":
        """Decided by the masks. With `tokens` on a GPU this waits for it, as L is a shape."""
        ids_BT = torch.zeros_like(tokens.input_ids) if tokens.segment_ids is None else tokens.segment_ids
        starts_BT = chat_starts(ids_BT)
        rows_BT, chat_goes_on_BT = shifted_loss_mask(tokens), ~shift_left(starts_BT)
        live_BT = rows_BT
        for _ in range(steps - 1):
            live_BT = rows_BT | (shift_left(live_BT) & chat_goes_on_BT)
        # Kernels and products need not know of empty tensors if one slot always counts.
        live_BT[0, 0] |= ~live_BT.any()
        places_L, boundaries_C = true_places(live_BT), chat_boundaries(starts_BT).long()
        return cls(
            places=places_L,
            chat_lengths=boundaries_C.diff().tolist(),
            live_lengths=torch.searchsorted(places_L, boundaries_C).diff().tolist(),
        )

    def every_slot(self) -> "LiveSlots":
        """The same chats, with all of their slots."""
        places = torch.arange(sum(self.chat_lengths), device=self.places.device)
        return replace(self, places=places, live_lengths=self.chat_lengths)

    def to(self, device: torch.device) -> "LiveSlots":
        return replace(self, places=to_device(self.places, device))


def index_among(live_L: Tensor, slots: Tensor) -> Tensor:
    """Which of the live slots each of `slots` is, both flat; for slots that are not live some valid index."""
    return torch.searchsorted(live_L, slots).clamp(max=len(live_L) - 1)
