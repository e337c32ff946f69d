"""Bytes of supervision on the wire, by encoding. The encodings of `supervision/encodings.py` are these with values."""

from abc import ABC, abstractmethod
from typing import ClassVar

# Row index, log-normaliser and argmax take four bytes each.
_ROW_BYTES = 12
# Of the scale of a float8 row.
SCALE_BYTES = 4


class WireSize(ABC):
    """The bytes that an encoding takes."""

    __slots__ = ()

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def value_bytes(hidden_size: int, draft_vocab_size: int, dtype_bytes: int) -> int:
        """Bytes of one row's values; `dtype_bytes`: of one element in the target's dtype."""

    @staticmethod
    def state_bytes(hidden_size: int, dtype_bytes: int) -> int:
        """Bytes of the captured states of one token and layer."""
        return dtype_bytes * hidden_size

    @classmethod
    def bytes_per_token(
        cls,
        *,
        hidden_size: int,
        draft_vocab_size: int,
        dtype_bytes: int,
        supervised_share: float = 1.0,
        num_aux_layers: int = 3,
    ) -> float:
        """Wire bytes of one real token whose row is supervised with probability `supervised_share`."""
        row_bytes = cls.value_bytes(hidden_size, draft_vocab_size, dtype_bytes) + _ROW_BYTES
        return num_aux_layers * cls.state_bytes(hidden_size, dtype_bytes) + supervised_share * row_bytes


class ProbsSize(WireSize):
    """Probabilities in fp32."""

    __slots__ = ()
    name = "probs"

    @staticmethod
    def value_bytes(hidden_size: int, draft_vocab_size: int, dtype_bytes: int) -> int:
        return 4 * draft_vocab_size


class LogitsSize(WireSize):
    """Logits in the target's dtype."""

    __slots__ = ()
    name = "logits"

    @staticmethod
    def value_bytes(hidden_size: int, draft_vocab_size: int, dtype_bytes: int) -> int:
        return dtype_bytes * draft_vocab_size


class HiddenSize(WireSize):
    """Last hidden states in the target's dtype."""

    __slots__ = ()
    name = "hidden"

    @staticmethod
    def value_bytes(hidden_size: int, draft_vocab_size: int, dtype_bytes: int) -> int:
        return dtype_bytes * hidden_size


class HiddenFp8Size(WireSize):
    """Last hidden states and captured ones in float8."""

    __slots__ = ()
    name = "hidden_fp8"

    @staticmethod
    def value_bytes(hidden_size: int, draft_vocab_size: int, dtype_bytes: int) -> int:
        return hidden_size + SCALE_BYTES

    @staticmethod
    def state_bytes(hidden_size: int, dtype_bytes: int) -> int:
        return hidden_size + SCALE_BYTES


WIRE_SIZES: dict[str, type[WireSize]] = {
    size.name: size for size in (ProbsSize, LogitsSize, HiddenSize, HiddenFp8Size)
}
"""By the name that the configuration and the wire hold."""
