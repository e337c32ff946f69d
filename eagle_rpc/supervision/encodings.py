"""The encodings: how the target's distribution at a supervised row travels from the target to the trainer.

A new encoding is a class in this file, an entry in `ENCODINGS`, and a name in
`eagle_rpc.config.choices.Encoding`. Legend: N supervised rows, H target hidden, K draft vocab.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from eagle_rpc.supervision.batch import DraftHead, DraftTargets, ProjectedTargets, StoredLogits, StoredProbs

# Row index, log-normaliser and argmax take four bytes each.
_ROW_BYTES = 12


class Encoding(ABC):
    """The values that travel for each row, made at the target and read at the trainer.

    They are made from draft-vocab logits by `encode`, or, with `needs_head`, are the last hidden states.
    """

    name: str
    needs_head = False
    """Whether the values are last hidden states, which trainers project with the target's head."""
    full_probabilities = True
    """Whether the values and the log-normaliser give probabilities over the full target vocabulary."""
    exact = True
    """Whether only rounding is lost. An encoding that is not exact is named so and never a default."""

    @abstractmethod
    def value_bytes(self, hidden_size: int, draft_vocab_size: int, dtype_bytes: int) -> int:
        """Bytes of one row's values; `dtype_bytes`: of one element in the target's dtype."""

    def encode(self, logits_NK: Tensor) -> Tensor:
        """At the target: the values [N, ...] that travel for these draft-vocab logits."""
        raise NotImplementedError(f"encoding {self.name} sends last hidden states")

    @abstractmethod
    def decode(self, values: Tensor, head: DraftHead | None) -> DraftTargets:
        """At the trainer: the distributions of N rows. `head` is needed with `needs_head` only."""

    def bytes_per_token(
        self, *, hidden_size: int, draft_vocab_size: int, dtype_bytes: int, supervised_share: float = 1.0
    ) -> float:
        """Wire bytes of one real token whose row is supervised with probability `supervised_share`."""
        row_bytes = self.value_bytes(hidden_size, draft_vocab_size, dtype_bytes) + _ROW_BYTES
        return 3 * hidden_size * dtype_bytes + supervised_share * row_bytes


class Probs(Encoding):
    """Probabilities among the draft vocabulary, [N, K] fp32, as the reference sends them."""

    name = "probs"
    full_probabilities = False

    def value_bytes(self, hidden_size: int, draft_vocab_size: int, dtype_bytes: int) -> int:
        return 4 * draft_vocab_size

    def encode(self, logits_NK: Tensor) -> Tensor:
        return logits_NK.float().softmax(dim=-1)

    def decode(self, values: Tensor, head: DraftHead | None) -> StoredProbs:
        return StoredProbs(values)


class Logits(Encoding):
    """Draft-vocab logits, [N, K] in the target's dtype."""

    name = "logits"

    def value_bytes(self, hidden_size: int, draft_vocab_size: int, dtype_bytes: int) -> int:
        return dtype_bytes * draft_vocab_size

    def encode(self, logits_NK: Tensor) -> Tensor:
        return logits_NK

    def decode(self, values: Tensor, head: DraftHead | None) -> StoredLogits:
        return StoredLogits(values)


class Hidden(Encoding):
    """Last hidden states, [N, H] in the target's dtype: the smallest form where H < K."""

    name = "hidden"
    needs_head = True

    def value_bytes(self, hidden_size: int, draft_vocab_size: int, dtype_bytes: int) -> int:
        return dtype_bytes * hidden_size

    def decode(self, values: Tensor, head: DraftHead | None) -> ProjectedTargets:
        assert head is not None, "encoding hidden needs the draft rows of the target's head"
        return ProjectedTargets(values, head)


ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in (Probs(), Logits(), Hidden())}
"""By the name that the configuration and the wire hold."""
