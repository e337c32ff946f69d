"""The fp32 master weights of a draft in training and their gradients: a copy on each trainer, or a shard.

The learner uses the protocol `MasterWeights`. The copy is here, the shards are in `sharded_weights`.
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
    """A draft's trainable weights as the optimiser sees them, and the sum of their gradients."""

    sharded: bool  # whether this trainer holds a shard of them
    parameters: dict[str, nn.Parameter]  # when the optimiser steps, `.grad` is the reduced gradient
    gradients: dict[str, Tensor]  # whole, of this trainer alone, fp32

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """In the body the draft's parameters are whole, and autograd adds to `gradients`. Collective."""

    def zero_gradients(self) -> None:
        """Before the first micro-batch of an optimiser step."""

    def reduce_gradients(self) -> None:
        """Sums the gradients of all trainers; the objective is normalised already."""

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales the reduced gradients to a global norm of at most `max_norm`; returns the norm before."""

    def gathered(self, tensor: Tensor) -> Tensor:
        """The whole of a parameter or of a tensor of its optimiser state. Collective, for the same tensor."""

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`gathered` of all `tensors`, on the primary trainer; empty elsewhere if sharded. Collective."""

    def shard_of(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """The part of `whole` that this trainer keeps for `parameter`, on its device."""

    def require_equal(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raises `ConfigError` if trainers would take shards of tensors that differ."""

    def are_finite(self) -> bool:
        """Whether all weights are finite; the same answer on all trainers."""


class ReplicatedWeights:
    """All weights on each trainer, bitwise equal. One collective sums the one buffer of all gradients.

    With one buffer the rounding of the sum depends on its layout alone; with buckets it would depend on
    timing.
    """

    sharded = False

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

    def gathered(self, tensor: Tensor) -> Tensor:
        return tensor

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def shard_of(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        return whole.to(parameter.device, copy=True)

    def require_equal(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Nothing to check: no tensor is assembled from several trainers."""

    def are_finite(self) -> bool:
        return all_finite(self.parameters.values())


def flat_buffer(parameters: Mapping[str, nn.Parameter], shards: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A flat fp32 buffer of zeros for all parameters, and views of it by name.

    Each view has the parameter's shape, with dim 0 rounded up to a multiple of `shards`.
    """
    shapes = {name: (-(-len(p) // shards) * shards, *p.shape[1:]) for name, p in parameters.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=next(iter(parameters.values())).device)
    views = (piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes.values(), strict=True))
    return flat, dict(zip(shapes, views, strict=True))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
