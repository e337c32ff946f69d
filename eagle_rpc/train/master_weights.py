"""The fp32 master weights of a draft in training and their gradients: a copy on every trainer, or a part on each.

`MasterWeights` is what the learner needs of either. Here is the copy; the parts are in `sharded`.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from eagle_rpc.train.distributed import TrainerGroup
from eagle_rpc.train.optimiser import trainable_parameters


class MasterWeights(Protocol):
    """A draft's trainable weights as the optimiser sees them, and where their gradients come together."""

    in_parts: bool  # whether this trainer holds less than all of them
    parameters: dict[str, nn.Parameter]  # with the reduced gradient as `.grad` when the optimiser steps
    gradients: dict[str, Tensor]  # whole, of this trainer alone, fp32

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """While the body runs the draft's own parameters are whole and autograd adds to `gradients`. All trainers enter it."""

    def zero_gradients(self) -> None:
        """Before the first micro-batch of an optimiser step."""

    def reduce_gradients(self) -> None:
        """Adds up the gradients of all trainers; the objective is normalised already."""

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales the reduced gradients down to a global norm of at most `max_norm`; returns the norm before, a scalar."""

    def whole_of(self, tensor: Tensor) -> Tensor:
        """All of a parameter or of a tensor of its optimiser state; every trainer asks for the same one."""

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `whole_of` for all `tensors`, on the primary trainer; every trainer asks."""

    def part_of(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """What of `whole` this trainer keeps beside `parameter`, on its device."""

    def require_alike(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raises `ConfigError` where trainers are about to keep parts of wholes that differ."""

    def are_finite(self) -> bool:
        """Whether all weights are, the same answer on all trainers."""


class ReplicatedWeights:
    """All weights on every trainer. The sum of gradients is one call over one buffer, and trainers stay alike bit for bit.

    One buffer also makes the sum's rounding a matter of layout alone; buckets that depend on timing would not.
    """

    in_parts = False

    def __init__(self, draft: nn.Module, group: TrainerGroup) -> None:
        self.parameters = trainable_parameters(draft)
        self._group = group
        self._flat, self.gradients = flat_buffer(self.parameters, 1)
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients[name]

    def whole(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def zero_gradients(self) -> None:
        self._flat.zero_()

    def reduce_gradients(self) -> None:
        self._group.sum_(self._flat, "gradients")

    def clip_gradients(self, max_norm: float) -> Tensor:
        norm = torch.linalg.vector_norm(self._flat)
        self._flat.mul_((max_norm / norm).clamp(max=1.0))
        return norm

    def whole_of(self, tensor: Tensor) -> Tensor:
        return tensor

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def part_of(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        return whole.to(parameter.device, copy=True)

    def require_alike(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Nothing is mixed here: whoever wants to know compares digests."""

    def are_finite(self) -> bool:
        return all_finite(self.parameters.values())


def flat_buffer(parameters: Mapping[str, nn.Parameter], parts: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros in fp32 for each parameter one after the other, and views of them by name.

    Each view has as many rows as the parameter, rounded up to a multiple of `parts`.
    """
    shapes = {
        name: (rounded_up(len(parameter), parts), *parameter.shape[1:])
        for name, parameter in parameters.items()
    }
    sizes = [math.prod(shape) for shape in shapes.values()]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=next(iter(parameters.values())).device)
    views = (piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes.values(), strict=True))
    return flat, dict(zip(shapes, views, strict=True))


def rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
