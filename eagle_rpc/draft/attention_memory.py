"""The keys and values that a draft's queries attend to: in training of all steps, in decoding of all tokens.

The decoder layer is the same for both; it gets one or the other `AttentionMemory`. `fused.step_attention` is
the fast form of `ttt_attention`.
Legend: B batch, T sequence, S new tokens, C cached tokens, Q query heads, G query heads of one key head, J
key heads, D head width.
"""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.supervision.segments import chat_lengths


class UnrollMemory:
    """Training-time test: each call is one step over the same T slots.

    With `segment_ids` [B, T] each packed chat attends to itself alone, and scores between chats are never
    computed.
    """

    def __init__(self, segment_ids: Tensor | None) -> None:
        self._chat_lengths = None if segment_ids is None else chat_lengths(segment_ids)
        # One list a step, with one entry a chat, or a single one for the whole batch.
        self._step_keys: list[list[Tensor]] = []
        self._step_values: list[list[Tensor]] = []

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores keys and values [B, J, T, D]; returns attended values [B, Q, T, D]."""
        self._step_keys.append(self._split(keys))
        self._step_values.append(self._split(values))
        chats = zip(
            self._split(queries),
            zip(*self._step_keys, strict=True),
            zip(*self._step_values, strict=True),
            strict=True,
        )
        return self._join([ttt_attention(*chat) for chat in chats])

    def _split(self, heads: Tensor) -> list[Tensor]:
        if self._chat_lengths is None:
            return [heads]
        sequences = zip(heads.split(1), self._chat_lengths, strict=True)
        return [chat for sequence, lengths in sequences for chat in sequence.split(lengths, dim=2)]

    def _join(self, chats: list[Tensor]) -> Tensor:
        if self._chat_lengths is None:
            return chats[0]
        rest = iter(chats)
        sequences = [torch.cat(list(islice(rest, len(lengths))), dim=2) for lengths in self._chat_lengths]
        return torch.cat(sequences)


class DraftCache:
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
        """As `UnrollMemory.attend`, with S queries."""
        if self._keys is not None and self._values is not None:
            keys = torch.cat((self._keys, keys), dim=2)
            values = torch.cat((self._values, values), dim=2)
        self._keys, self._values = keys, values
        new, total = queries.shape[2], keys.shape[2]
        visible_SC = None
        if new > 1:
            # SDPA's causal flag aligns the first query with the first key; here the last ones have to align.
            visible_SC = torch.ones(new, total, dtype=torch.bool, device=keys.device).tril(total - new)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible_SC, enable_gqa=True)


AttentionMemory = UnrollMemory | DraftCache


def ttt_attention(queries: Tensor, step_keys: Sequence[Tensor], step_values: Sequence[Tensor]) -> Tensor:
    """Attention of one step: causal over step 0, plus the query's own slot in every later step so far.

    `queries` [B, Q, T, D] are those of the last step; keys and values [B, J, T, D] are those of all steps up
    to it. Queries and keys are rotated already. Returns [B, Q, T, D]. Padding on the right needs no mask: no
    real slot attends to later slots.
    """
    key_heads, length, width = step_keys[0].shape[1:]
    queries_BJGTD = (queries * width**-0.5).unflatten(1, (key_heads, -1))
    scores_BJGTT = (queries_BJGTD.flatten(2, 3) @ step_keys[0].transpose(-1, -2)).unflatten(2, (-1, length))
    own_BJGT1 = [(queries_BJGTD * keys.unsqueeze(2)).sum(-1, keepdim=True) for keys in step_keys[1:]]
    # 0 where a slot may attend, -inf at later slots.
    later_TT = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1)
    bias_TT = queries.new_zeros(length, length).masked_fill_(later_TT, float("-inf"))
    weights = torch.cat((scores_BJGTT + bias_TT, *own_BJGT1), dim=-1).softmax(dim=-1)
    output_BJGTD = (weights[..., :length].flatten(2, 3) @ step_values[0]).unflatten(2, (-1, length))
    for step, values in enumerate(step_values[1:]):
        output_BJGTD = output_BJGTD + weights[..., length + step, None] * values.unsqueeze(2)
    return output_BJGTD.flatten(1, 2)
