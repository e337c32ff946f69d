"""The encodings: how the target's distribution at a supervised row travels from the target to the trainer.

A new encoding takes four steps:

1. `sizes/wire.py`: its bytes, a `WireSize`;
2. here, a class: a `LogitEncoding` if its values come from draft-vocab logits, a `ProjectedTargets` if trainers
   project hidden states;
3. here, its entry in `ENCODINGS`;
4. `config/choices.py`: its name in `Encoding`, from which `supervision.encoding` is chosen.

Legend: N supervised rows, n rows of a slice, H target hidden, K draft vocab.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.sizes.wire import HiddenFp8Size, HiddenSize, LogitsSize, ProbsSize, WireSize


@dataclass(kw_only=True, slots=True)
class DraftHead:
    """The draft-vocab rows of the target's output head, in its dtype.

    They compute `soft_cap * tanh((hidden @ weight.T + bias) * scale / soft_cap)`.
    """

    weight: Tensor  # [K, H]
    bias: Tensor | None = None  # [K]
    scale: float | None = None
    soft_cap: float | None = None

    def project(self, hidden_NH: Tensor) -> Tensor:
        """Draft-vocab logits [N, K] of last hidden states, in their dtype."""
        logits_NK = F.linear(hidden_NH, self.weight, self.bias)
        if self.scale is not None:
            logits_NK = logits_NK * self.scale
        if self.soft_cap is not None:
            logits_NK = torch.tanh(logits_NK / self.soft_cap) * self.soft_cap
        return logits_NK

    def to(self, device: torch.device) -> "DraftHead":
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def to_tensors(self) -> dict[str, Tensor]:
        """The fields that are given, by name; numbers as fp64 scalars."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            for name, value in given.items()
            if value is not None
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "DraftHead":
        """The head of `to_tensors`."""
        numbers = {name: tensors[name].item() for name in ("scale", "soft_cap") if name in tensors}
        return cls(weight=tensors["weight"], bias=tensors.get("bias"), **numbers)


@dataclass(slots=True)
class DraftTargets(WireSize):
    """The target's distribution over the draft vocabulary at N supervised rows. Each subclass is an encoding.

    The values come from draft-vocab logits (`LogitEncoding`), or with `needs_head` they are the last hidden
    states. The trainer reads them in slices.
    """

    values: Tensor  # [N, ...] as they travel
    head: DraftHead | None = None  # given with `needs_head` only

    needs_head: ClassVar[bool] = False
    """Whether the values are last hidden states, which trainers project with the target's head."""
    exact: ClassVar[bool] = True
    """Whether only rounding is lost. An encoding that is not exact is named so and never a default."""
    fp8_states: ClassVar[bool] = False
    """Whether hidden states travel in float8 (`fp8_states`). Trainers read them in the dtype of the head."""

    @abstractmethod
    def logits(self, rows: slice) -> Tensor:
        """Draft-vocab logits [n, K] of a slice of n rows."""

    def probs(self, rows: slice) -> Tensor:
        """Softmax over the draft-vocab logits alone, [n, K] fp32."""
        return self.logits(rows).float().softmax(dim=-1)


class LogitEncoding(DraftTargets):
    """An encoding whose values the target makes from draft-vocab logits."""

    __slots__ = ()

    @staticmethod
    @abstractmethod
    def encode(logits_NK: Tensor) -> Tensor:
        """At the target: the values [N, ...] that travel for these draft-vocab logits."""


class StoredProbs(ProbsSize, LogitEncoding):
    """Probabilities among the draft vocabulary, [N, K] fp32, as the reference sends them.

    Their logarithms serve as logits.
    """

    __slots__ = ()

    @staticmethod
    def encode(logits_NK: Tensor) -> Tensor:
        return logits_NK.float().softmax(dim=-1)

    def logits(self, rows: slice) -> Tensor:
        return self.values[rows].log()

    def probs(self, rows: slice) -> Tensor:
        return self.values[rows]


class StoredLogits(LogitsSize, LogitEncoding):
    """Draft-vocab logits, [N, K] in the target's dtype."""

    __slots__ = ()

    @staticmethod
    def encode(logits_NK: Tensor) -> Tensor:
        return logits_NK

    def logits(self, rows: slice) -> Tensor:
        return self.values[rows]


class ProjectedTargets(HiddenSize, DraftTargets):
    """Last hidden states, [N, H] in the target's dtype: the smallest form where H < K."""

    __slots__ = ()
    needs_head = True

    def logits(self, rows: slice) -> Tensor:
        assert self.head is not None, "encoding hidden needs the draft rows of the target's head"
        return self.head.project(self.values[rows])


class Fp8ProjectedTargets(HiddenFp8Size, ProjectedTargets):
    """`ProjectedTargets` whose last hidden states, and the captured ones, travelled in float8: half the bytes."""

    __slots__ = ()
    exact = False
    fp8_states = True


ENCODINGS: dict[str, type[DraftTargets]] = {
    encoding.name: encoding for encoding in (StoredProbs, StoredLogits, ProjectedTargets, Fp8ProjectedTargets)
}
"""By the name that the configuration and the wire hold."""
