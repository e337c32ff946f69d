"""What the fused unroll computes of a batch, decided on the CPU by the masks alone.

Live slots take part in all steps. An idle slot gives its key and value of step 0, if live slots attend to it.
Attention takes the form with less work:

* blocks: each run of live slots in a chat is a sequence of queries for flash attention, with copies of the
  keys from the start of the chat to the run's last slot;
* whole sequences, where chats are not packed: the queries of live slots stand among zeros.

Legend: B batch, T sequence, S steps, U = T + S - 1, N = B T slots, L live slots, I idle slots, M keys of
attention, C blocks, E embedded tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.draft.fused.causal_attention import QueryBlocks
from eagle_rpc.draft.live_slots import LiveSlots
from eagle_rpc.supervision import TokenBatch, to_device
from eagle_rpc.supervision.tokens import true_places

# From this share of live slots on, leaving the others out gains nothing.
_ALL_LIVE_SHARE = 0.95
# cuDNN's kernels for whole sequences are this much faster than flash attention over blocks (H100, heads of 128).
_SPEED_OF_WHOLE_SEQUENCES = 1.5
# A further block copies the keys before it. The slots of a short gap are unrolled instead: one takes the
# memory of about as many copied keys.
_KEYS_OF_A_SLOT = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotPlan:
    """The slots of one batch, as flat places b * T + t, on the device of the draft."""

    shape: tuple[int, int]  # B, T
    live: Tensor  # [L] int64, ascending
    idle: Tensor  # [I] int64, ascending
    blocks: QueryBlocks | None  # None: attention over whole sequences
    key_sources: Tensor  # [M] int64, the slot of each key as an index into live slots followed by idle ones
    embedded: Tensor  # [E] int64, tokens that live slots read at any step, flat b * U + u, ascending
    first_embedded: Tensor  # [L] int64, which of them each live slot reads at step 0; then come the next ones

    @property
    def all_live(self) -> bool:
        """Whether attention over whole sequences takes queries and keys of live slots as they are."""
        return self.blocks is None and len(self.live) == self.shape[0] * self.shape[1]

    @classmethod
    def of(cls, tokens: TokenBatch, steps: int, device: torch.device) -> "SlotPlan":
        """With `tokens` on the CPU this does not wait for a GPU."""
        live, (batch, length) = LiveSlots.of(tokens.to(torch.device("cpu")), steps), tokens.shape
        every_N, pairs_of_whole = torch.arange(batch * length), batch * length * (length + 1) // 2
        live_L, keys_M, in_blocks = _in_blocks(live)
        blocks: QueryBlocks | None = in_blocks.to(device)
        if tokens.segment_ids is None:
            if len(live.places) >= _ALL_LIVE_SHARE * len(every_N):
                live_L, keys_M, blocks = every_N, every_N, None
            elif pairs_of_whole <= _SPEED_OF_WHOLE_SEQUENCES * in_blocks.pairs:
                live_L, keys_M, blocks = live.places, every_N, None
        is_idle_N = torch.zeros_like(every_N, dtype=torch.bool)
        is_idle_N[keys_M] = True
        is_idle_N[live_L] = False
        idle_I = true_places(is_idle_N)
        index_N = torch.empty_like(every_N)
        index_N[torch.cat((live_L, idle_I))] = every_N[: len(live_L) + len(idle_I)]
        embedded_E, first_L = _embedded(live_L, length, steps, batch * (length + steps - 1))
        return cls(
            shape=(batch, length),
            live=to_device(live_L, device),
            idle=to_device(idle_I, device),
            blocks=blocks,
            key_sources=to_device(index_N[keys_M], device),
            embedded=to_device(embedded_E, device),
            first_embedded=to_device(first_L, device),
        )


def _in_blocks(live: LiveSlots) -> tuple[Tensor, Tensor, QueryBlocks]:
    """Live slots [L] with those of short gaps, the slots of keys [M], and their blocks."""
    chat_bounds = F.pad(torch.tensor(live.chat_lengths).cumsum(0), (1, 0))
    chat_starts_L = chat_bounds[torch.searchsorted(chat_bounds, live.places, right=True) - 1]
    gaps, prefixes = live.places.diff() - 1, live.places - chat_starts_L
    breaks = true_places((chat_starts_L.diff() > 0) | (gaps * _KEYS_OF_A_SLOT > prefixes[1:]))
    firsts_C = F.pad(breaks + 1, (1, 0))
    ends_C = 1 + live.places[F.pad(breaks, (0, 1), value=len(live.places) - 1)]
    live_L, query_bounds = _ranges(live.places[firsts_C], ends_C)
    keys_M, key_bounds = _ranges(chat_starts_L[firsts_C], ends_C)
    return live_L, keys_M, QueryBlocks.of(query_bounds, key_bounds)


def _embedded(live_L: Tensor, length: int, steps: int, size: int) -> tuple[Tensor, Tensor]:
    """`embedded` and `first_embedded` of a plan, of `size` B U."""
    first_L = live_L + live_L // length * (steps - 1)
    is_read = torch.zeros(size, dtype=torch.bool)
    for step in range(steps):
        is_read[first_L + step] = True
    embedded_E = true_places(is_read)
    return embedded_E, torch.searchsorted(embedded_E, first_L)


def _ranges(starts_C: Tensor, ends_C: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of all ranges, one range after the other, and where each begins, with their number; [C + 1]."""
    lengths_C = ends_C - starts_C
    bounds = F.pad(lengths_C.cumsum(0), (1, 0))
    integers = torch.arange(int(bounds[-1])) + (starts_C - bounds[:-1]).repeat_interleave(lengths_C)
    return integers, bounds
