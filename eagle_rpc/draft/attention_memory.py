"""The keys and values that a draft's queries attend to: in training of all steps, in decoding of all tokens.

The decoder layers are the same for all; each gets its part of one or the other `DraftMemory`. With a sliding
window of W tokens a query at position p attends to positions above p - W. `fused.step_attention` is the fast form
of `ttt_attention`.
Legend: B batch, T slots of step 0, L slots that ask, S new tokens, C cached tokens, A chains, Q query heads, G
query heads of one key head, J key heads, D head width.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.draft.live_slots import LiveSlots


class AttentionMemory(Protocol):
    """What one pass through one layer attends to."""

    def asking(self, x: Tensor) -> Tensor:
        """The slots of `x` [..., T, width] whose queries the next `attend` has."""
        return x

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores rotated keys and values [B, J, T, D]; returns attended values [B, Q, T, D]."""


class DraftMemory(Protocol):
    """What one pass of a draft attends to, layer by layer."""

    layers: Sequence[AttentionMemory]


class UnrollMemory(DraftMemory):
    """Training-time test: the first pass is step 0 over all slots, each later one a step over the live ones."""

    def __init__(self, live: LiveSlots, num_layers: int = 1, window: int | None = None) -> None:
        # At step 0 the outputs of all layers but the last give keys and values to the next layer at all slots.
        asking_first = [live.every_slot()] * (num_layers - 1) + [live]
        self.layers = [_UnrollLayer(live, asking, window) for asking in asking_first]


class _UnrollLayer(AttentionMemory):
    """Each chat attends to itself alone, and scores between chats are never computed."""

    def __init__(self, live: LiveSlots, asking_first: LiveSlots, window: int | None) -> None:
        """`asking_first`: the slots that ask at step 0."""
        self._live, self._asking_first, self._window = live, asking_first, window
        # One list a step, with one entry a chat.
        self._step_keys: list[Sequence[Tensor]] = []
        self._step_values: list[Sequence[Tensor]] = []

    def asking(self, x: Tensor) -> Tensor:
        """At step 0 some slots, then all of them."""
        return x if self._step_keys else x.index_select(-2, self._asking_first.places)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores keys and values [1, J, T, D] (later [1, J, L, D]); returns attended values [1, Q, L, D]."""
        step = len(self._step_keys)
        asking = self._live if step else self._asking_first
        lengths = self._live.live_lengths if step else self._live.chat_lengths
        self._step_keys.append(keys.split(lengths, dim=2))
        self._step_values.append(values.split(lengths, dim=2))
        own_steps = range(1 if self._window is None else max(1, step - self._window + 1), step + 1)
        seen = [0, *own_steps]
        chats = zip(
            queries.split(asking.live_lengths, dim=2),
            zip(*[self._step_keys[place] for place in seen], strict=True),
            zip(*[self._step_values[place] for place in seen], strict=True),
            self._hidden_of_chats(asking, step),
            strict=True,
        )
        return torch.cat([ttt_attention(*chat) for chat in chats if chat[0].shape[2] > 0], dim=2)

    def _hidden_of_chats(self, asking: LiveSlots, step: int) -> Iterator[Tensor]:
        """Of each chat [L, T]: whether a slot's key of step 0 is hidden from the query of another."""
        starts = itertools.accumulate(asking.chat_lengths, initial=0)
        places_of_chats = asking.places.split(asking.live_lengths)
        for start, length, places_L in zip(starts, asking.chat_lengths, places_of_chats, strict=False):
            keys_T = torch.arange(start, start + length, device=places_L.device)
            yield _hidden(keys_T, places_L, step, self._window)


def _hidden(keys_C: Tensor, slots_L: Tensor, step: int, window: int | None) -> Tensor:
    """[L, C]: true where a key comes after a slot, or out of the window of its query, `step` tokens further."""
    hidden_LC = keys_C > slots_L.unsqueeze(1)
    return hidden_LC if window is None else hidden_LC | (keys_C <= slots_L.unsqueeze(1) + step - window)


class DraftCache(DraftMemory):
    """Decoding: each pass appends tokens; a token attends to itself and to earlier ones."""

    def __init__(self, num_layers: int = 1, window: int | None = None) -> None:
        self._caches = [_LayerCache(window) for _ in range(num_layers)]
        self.layers = self._caches

    @property
    def length(self) -> int:
        """Cached tokens C."""
        return self._caches[0].length

    def truncate(self, length: int) -> None:
        """Keeps only the first `length` tokens (0 <= length <= self.length)."""
        assert 0 <= length <= self.length, f"length must lie in [0, {self.length}], got {length}"
        for cache in self._caches:
            cache.truncate(length)

    def chains(self, slots_A: Tensor) -> "ChainMemory":
        """The memory of A chains of guesses, one from each of the cached `slots_A` of the only sequence."""
        return ChainMemory([cache.chains(slots_A) for cache in self._caches])


class _LayerCache(AttentionMemory):
    def __init__(self, window: int | None) -> None:
        self._window = window
        self._keys: Tensor | None = None  # [B, J, C, D]
        self._values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self._keys is None else self._keys.shape[2]

    def truncate(self, length: int) -> None:
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[:, :, :length], self._values[:, :, :length]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores keys and values [B, J, S, D]; returns attended values [B, Q, S, D]."""
        if self._keys is not None and self._values is not None:
            keys = torch.cat((self._keys, keys), dim=2)
            values = torch.cat((self._values, values), dim=2)
        self._keys, self._values = keys, values
        new, total = queries.shape[2], keys.shape[2]
        reaches_back = self._window is not None and total > self._window
        first, visible_SC = new == total and not reaches_back, None
        if reaches_back or (not first and new > 1):
            # SDPA's causal flag aligns the first query with the first key; here the last ones have to align.
            keys_C = torch.arange(total, device=keys.device)
            visible_SC = ~_hidden(keys_C, keys_C[total - new :], 0, self._window)
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible_SC, is_causal=first, enable_gqa=True
        )

    def chains(self, slots_A: Tensor) -> "_LayerChains":
        assert self._keys is not None and self._values is not None, "chains follow a pass over the text"
        return _LayerChains(self._keys, self._values, slots_A, self._window)


class ChainMemory(DraftMemory):
    """Decoding of many chains: a guess attends to the text up to its chain's slot, and to its chain."""

    def __init__(self, layers: "Sequence[_LayerChains]") -> None:
        self._chains = layers
        self.layers = layers

    def follow(self, chains_R: Tensor) -> None:
        """Chain r goes on from what chain `chains_R[r]` is so far; several may go on from one, as in a tree."""
        for layer in self._chains:
            layer.follow(chains_R)


class _LayerChains(AttentionMemory):
    def __init__(self, keys: Tensor, values: Tensor, slots_A: Tensor, window: int | None) -> None:
        """Keys and values of the text are [1, J, C, D]."""
        self._text_keys, self._text_values = keys, values
        self._slots_A, self._window = slots_A, window
        self._own: list[tuple[Tensor, Tensor]] = []

    def follow(self, chains_R: Tensor) -> None:
        self._slots_A = self._slots_A[chains_R]
        self._own = [(keys[:, :, chains_R], values[:, :, chains_R]) for keys, values in self._own]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Each call adds one guess to every chain: keys and values [1, J, A, D]."""
        self._own.append((keys, values))
        key_heads, length, num_chains = keys.shape[1], self._text_keys.shape[2], len(self._slots_A)
        keys_C = torch.arange(length, device=keys.device)
        hidden_AC = _hidden(keys_C, self._slots_A, len(self._own), self._window)
        own_seen = self._own if self._window is None else self._own[-self._window :]
        queries_JGAD = (queries[0] * queries.shape[-1] ** -0.5).unflatten(0, (key_heads, -1))
        scores = queries_JGAD.flatten(1, 2) @ self._text_keys[0].transpose(-1, -2)
        scores_JGAC = scores.unflatten(1, (-1, num_chains)).masked_fill(hidden_AC, float("-inf"))
        own_JGA1 = [(queries_JGAD * own.transpose(0, 1)).sum(-1, keepdim=True) for own, _ in own_seen]
        weights = torch.cat((scores_JGAC, *own_JGA1), dim=-1).softmax(dim=-1)
        output = weights[..., :length].flatten(1, 2) @ self._text_values[0]
        output_JGAD = output.unflatten(1, (-1, num_chains))
        for place, (_, own) in enumerate(own_seen, start=length):
            output_JGAD = output_JGAD + weights[..., place, None] * own.transpose(0, 1)
        return output_JGAD.flatten(0, 1)[None]


def ttt_attention(
    queries: Tensor, step_keys: Sequence[Tensor], step_values: Sequence[Tensor], hidden_LT: Tensor
) -> Tensor:
    """Attention of one step of a chat: over step 0, plus the query's own slot in later steps so far.

    `queries` [B, Q, L, D] are those of the last step at live slots; keys and values are those of all steps up
    to it, [B, J, T, D] of step 0 and [B, J, L, D] of later ones. Queries and keys are rotated already.
    `hidden_LT` is true where the live slot L does not attend to the key of slot T. Returns [B, Q, L, D].
    Padding on the right needs no mask: no real slot attends to later slots.
    """
    key_heads, length, width = step_keys[0].shape[1:]
    queries_BJGLD = (queries * width**-0.5).unflatten(1, (key_heads, -1))
    live = queries_BJGLD.shape[3]
    scores_BJGLT = (queries_BJGLD.flatten(2, 3) @ step_keys[0].transpose(-1, -2)).unflatten(2, (-1, live))
    own_BJGL1 = [(queries_BJGLD * keys.unsqueeze(2)).sum(-1, keepdim=True) for keys in step_keys[1:]]
    # 0 where a slot may attend, -inf elsewhere.
    bias_LT = queries.new_zeros(hidden_LT.shape).masked_fill_(hidden_LT, float("-inf"))
    weights = torch.cat((scores_BJGLT + bias_LT, *own_BJGL1), dim=-1).softmax(dim=-1)
    output_BJGLD = (weights[..., :length].flatten(2, 3) @ step_values[0]).unflatten(2, (-1, live))
    for step, values in enumerate(step_values[1:]):
        output_BJGLD = output_BJGLD + weights[..., length + step, None] * values.unsqueeze(2)
    return output_BJGLD.flatten(1, 2)
