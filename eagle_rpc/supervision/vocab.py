"""The draft vocabulary: which target tokens the draft can emit.

Legend: V target vocab, K draft vocab.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_rpc.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class VocabMapping:
    """K distinct target ids in ascending order; draft id i stands for `selected_token_ids[i]`.

    Ascending order makes slicing by `t2d` and gathering by `d2t` the same thing, which the serving engines differ on.
    """

    selected_token_ids: Tensor  # [K] int64, cpu, strictly ascending
    target_vocab_size: int

    @classmethod
    def from_token_ids(cls, selected_token_ids: Tensor, target_vocab_size: int) -> "VocabMapping":
        """Checks and sorts. Raises `InvalidRequest` on a wrong dtype or shape, duplicates, or ids outside [0, V)."""
        if not isinstance(selected_token_ids, Tensor):
            raise InvalidRequest(
                f"selected_token_ids must be a tensor, got {type(selected_token_ids).__name__}"
            )
        if selected_token_ids.dtype != torch.int64 or selected_token_ids.dim() != 1:
            raise InvalidRequest(
                f"selected_token_ids must be int64 [K], got {selected_token_ids.dtype} {list(selected_token_ids.shape)}"
            )
        size = selected_token_ids.numel()
        if not 0 < size <= target_vocab_size:
            raise InvalidRequest(f"selected_token_ids must hold 1 to {target_vocab_size} ids, got {size}")
        ids = selected_token_ids.cpu().sort().values
        if int(ids[0]) < 0 or int(ids[-1]) >= target_vocab_size:
            raise InvalidRequest(
                f"selected_token_ids must lie in [0, {target_vocab_size}), got values from {int(ids[0])} to {int(ids[-1])}"
            )
        repeated = ids[1:][ids[1:] == ids[:-1]]
        if repeated.numel():
            raise InvalidRequest(
                f"selected_token_ids must be distinct, got {int(repeated[0])} more than once"
            )
        return cls(ids, target_vocab_size)

    def __len__(self) -> int:
        return self.selected_token_ids.numel()

    @property
    def d2t(self) -> Tensor:
        """Offsets [K] int64 as serving engines read them: target id = draft id + d2t[draft id]."""
        return self.selected_token_ids - torch.arange(len(self))

    @property
    def t2d(self) -> Tensor:
        """Membership [V] bool of each target id."""
        member = torch.zeros(self.target_vocab_size, dtype=torch.bool)
        member[self.selected_token_ids] = True
        return member

    @property
    def draft_ids(self) -> Tensor:
        """Draft id of each target id, -1 outside the draft vocabulary; [V] int64."""
        ids = torch.full((self.target_vocab_size,), -1, dtype=torch.int64)
        ids[self.selected_token_ids] = torch.arange(len(self))
        return ids

    @property
    def digest(self) -> str:
        """Content address: mappings with equal digests are equal."""
        content = self.selected_token_ids.numpy().tobytes() + self.target_vocab_size.to_bytes(8, "little")
        return hashlib.sha256(content).hexdigest()
