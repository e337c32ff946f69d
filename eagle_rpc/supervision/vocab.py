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
    """K distinct target ids in ascending order; draft id i is target id `selected_token_ids[i]`.

    Some serving engines slice by `t2d`, others gather by `d2t`; in ascending order both give the same.
    """

    selected_token_ids: Tensor  # [K] int64, cpu, strictly ascending
    target_vocab_size: int

    @classmethod
    def from_token_ids(cls, selected_token_ids: Tensor, target_vocab_size: int) -> "VocabMapping":
        """Checks and sorts. Raises `InvalidRequest` for a wrong form, duplicates, or ids beyond [0, V)."""
        given = selected_token_ids
        if not isinstance(given, Tensor):
            raise InvalidRequest(f"selected_token_ids must be a tensor, got {type(given).__name__}")
        if given.dtype != torch.int64 or given.dim() != 1:
            found = f"{given.dtype} {list(given.shape)}"
            raise InvalidRequest(f"selected_token_ids must be int64 [K], got {found}")
        size, vocab = given.numel(), target_vocab_size
        if not 0 < size <= vocab:
            raise InvalidRequest(f"selected_token_ids must hold 1 to {vocab} ids, got {size}")
        ids = given.cpu().sort().values
        lowest, highest = int(ids[0]), int(ids[-1])
        if lowest < 0 or highest >= vocab:
            found = f"values from {lowest} to {highest}"
            raise InvalidRequest(f"selected_token_ids must lie in [0, {vocab}), got {found}")
        repeated = ids[1:][ids[1:] == ids[:-1]]
        if repeated.numel():
            found = f"{int(repeated[0])} more than once"
            raise InvalidRequest(f"selected_token_ids must be distinct, got {found}")
        return cls(ids, vocab)

    def __len__(self) -> int:
        return self.selected_token_ids.numel()

    @property
    def d2t(self) -> Tensor:
        """Offsets [K] int64, as serving engines read them: target id = draft id + d2t[draft id]."""
        return self.selected_token_ids - torch.arange(len(self))

    @property
    def t2d(self) -> Tensor:
        """[V] bool, whether a target id is in the draft vocabulary."""
        member = torch.zeros(self.target_vocab_size, dtype=torch.bool)
        member[self.selected_token_ids] = True
        return member

    @property
    def draft_ids(self) -> Tensor:
        """[V] int64, the draft id of each target id, -1 outside the draft vocabulary."""
        ids = torch.full((self.target_vocab_size,), -1, dtype=torch.int64)
        ids[self.selected_token_ids] = torch.arange(len(self))
        return ids

    @property
    def digest(self) -> str:
        """Hash of the content: mappings with equal digests are equal."""
        content = self.selected_token_ids.numpy().tobytes() + self.target_vocab_size.to_bytes(8, "little")
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, slots=True)
class DraftVocabOnDevice:
    """A mapping's two lookup tables on the target's device."""

    selected_token_ids: Tensor  # [K] int64
    draft_ids: Tensor  # [V] int64, -1 outside the draft vocabulary

    @classmethod
    def of(cls, mapping: VocabMapping, device: torch.device) -> "DraftVocabOnDevice":
        return cls(mapping.selected_token_ids.to(device), mapping.draft_ids.to(device))
