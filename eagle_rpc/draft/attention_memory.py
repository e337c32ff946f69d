"""The keys and values that a draft's queries attend to: in training of all steps, in decoding of all tokens.

The decoder layer is the same for all; it gets one or the other `AttentionMemory`. `fused.step_attention` is
the fast form of `ttt_attention`.
Legend: B batch, T slots of step 0, L live slots, S new tokens, C cached tokens, A chains, Q query heads, G
query heads of one key head, J key heads, D head width.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.draft.live_slots import LiveSlots


class AttentionMemory(Protocol):
    """What one pass of the draft attends to."""

    def asking(self, x: Tensor) -> Tensor:
        """The slots of `x` [..., T, width] whose queries the next `attend` has."""
        return x

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores rotated keys and values [B, J, T, D]; returns attended values [B, Q, T, D]."""


class UnrollMemory(AttentionMemory):
    """Training-time test: the first call is step 0 over all slots, each later one a step over the live ones.

    Each chat attends to itself alone, and scores between chats are never computed.
    """

    def __init__(self, live: LiveSlots) -> None:
        self._live = live
        # One list a step, with one entry a chat.
        self._step_keys: list[Sequence[Tensor]] = []
        self._step_values: list[Sequence[Tensor]] = []
        starts = itertools.accumulate(live.chat_lengths, initial=0)
        places_of_chats = live.places.split(live.live_lengths)
        self._later_LT = [  # of each chat
            torch.arange(start, start + length, device=places_L.device) > places_L.unsqueeze(1)
            for start, length, places_L in zip(starts, live.chat_lengths, places_of_chats, strict=False)
        ]

    def asking(self, x: Tensor) -> Tensor:
        """At step 0 the live slots, then all of them."""
        return x if self._step_keys else x.index_select(-2, self._live.places)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores keys and values [1, J, T, D] (later [1, J, L, D]); returns attended values [1, Q, L, D]."""
        lengths = self._live.live_lengths if self._step_keys else self._live.chat_lengths
        self._step_keys.append(keys.split(lengths, dim=2))
        self._step_values.append(values.split(lengths, dim=2))
        chats = zip(
            queries.split(self._live.live_lengths, dim=2),
            zip(*self._step_keys, strict=True),
            zip(*self._step_values, strict=True),
            self._later_LT,
            strict=True,
        )
        return torch.cat([ttt_attention(*chat) for chat in chats if chat[0].shape[2] > 0], dim=2)


class DraftCache(AttentionMemory):
    """Decoding: each call appends tokens; a token attends to itself and to all earlier ones."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None  # [B, J, C, D]
        self._values: Tensor | None = None

    @property
    def length(self) -> int:
        """Cached tokens C."""
        return 0 if self._keys is None else self._keys.shape[2]

    def truncate(self, length: int) -> None:
        """Keeps only the first `length` tokens (0 <= length <= self.length)."""
        assert 0 <= length <= self.length, f"length must lie in [0, {self.length}], got {length}"
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[:, :, :length], self._values[:, :, :length]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores keys and values [B, J, S, D]; returns attended values [B, Q, S, D]."""
        if self._keys is not None and self._values is not None:
            keys = torch.cat((self._keys, keys), dim=2)
            values = torch.cat((self._values, values), dim=2)
        self._keys, self._values = keys, values
        new, total = queries.shape[2], keys.shape[2]
        first, visible_SC = new == total, None
        if not first and new > 1:
            # SDPA's causal flag aligns the first query with the first key; here the last ones have to align.
            visible_SC = torch.ones(new, total, dtype=torch.bool, device=keys.device).tril(total - new)
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible_SC, is_causal=first, enable_gqa=True
        )

    def chains(self, slots_A: Tensor) -> "ChainMemory":
        """The memory of A chains of guesses, one from each of the cached `slots_A` of the only sequence."""
        assert self._keys is not None and self._values is not None, "chains follow a pass over the text"
        return ChainMemory(self._keys, self._values, slots_A)


class ChainMemory(AttentionMemory):
    """Decoding of many chains: a guess attends to the text up to its chain's slot, and to its chain."""

    def __init__(self, keys: Tensor, values: Tensor, slots_A: Tensor) -> None:
        """Keys and values of the text are [1, J, C, D]."""
        self._text_keys, self._text_values = keys, values
        self._hidden_AC = torch.arange(keys.shape[2], device=keys.device) > slots_A[:, None]
        self._own: list[tuple[Tensor, Tensor]] = []

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Each call adds one guess to every chain: keys and values [1, J, A, D]."""
        self._own.append((keys, values))
        key_heads, (num_chains, length) = keys.shape[1], self._hidden_AC.shape
        queries_JGAD = (queries[0] * queries.shape[-1] ** -0.5).unflatten(0, (key_heads, -1))
        scores = queries_JGAD.flatten(1, 2) @ self._text_keys[0].transpose(-1, -2)
        scores_JGAC = scores.unflatten(1, (-1, num_chains)).masked_fill(self._hidden_AC, float("-inf"))
        own_JGA1 = [(queries_JGAD * own.transpose(0, 1)).sum(-1, keepdim=True) for own, _ in self._own]
        weights = torch.cat((scores_JGAC, *own_JGA1), dim=-1).softmax(dim=-1)
        output = weights[..., :length].flatten(1, 2) @ self._text_values[0]
        output_JGAD = output.unflatten(1, (-1, num_chains))
        for place, (_, own) in enumerate(self._own, start=length):
            output_JGAD = output_JGAD + weights[..., place, None] * own.transpose(0, 1)
        return output_JGAD.flatten(0, 1)[None]


def ttt_attention(
    queries: Tensor, step_keys: Sequence[Tensor], step_values: Sequence[Tensor], later_LT: Tensor
) -> Tensor:
    """Attention of one step of a chat: causal over step 0, plus the query's own slot in later steps so far.

    `queries` [B, Q, L, D] are those of the last step at live slots; keys and values are those of all steps up
    to it, [B, J, T, D] of step 0 and [B, J, L, D] of later ones. Queries and keys are rotated already.
    `later_LT` is true where the slot T comes after the live slot L. Returns [B, Q, L, D]. Padding on the
    right needs no mask: no real slot attends to later slots.
    """
    key_heads, length, width = step_keys[0].shape[1:]
    queries_BJGLD = (queries * width**-0.5).unflatten(1, (key_heads, -1))
    live = queries_BJGLD.shape[3]
    scores_BJGLT = (queries_BJGLD.flatten(2, 3) @ step_keys[0].transpose(-1, -2)).unflatten(2, (-1, live))
    own_BJGL1 = [(queries_BJGLD * keys.unsqueeze(2)).sum(-1, keepdim=True) for keys in step_keys[1:]]
    # 0 where a slot may attend, -inf at later slots.
    bias_LT = queries.new_zeros(later_LT.shape).masked_fill_(later_LT, float("-inf"))
    weights = torch.cat((scores_BJGLT + bias_LT, *own_BJGL1), dim=-1).softmax(dim=-1)
    output_BJGLD = (weights[..., :length].flatten(2, 3) @ step_values[0]).unflatten(2, (-1, live))
    for step, values in enumerate(step_values[1:]):
        output_BJGLD = output_BJGLD + weights[..., length + step, None] * values.unsqueeze(2)
    return output_BJGLD.flatten(1, 2)
