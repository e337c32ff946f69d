"""The fp32 master weights of a draft in training and their gradients: a copy on each trainer.

`sharded_weights` has the form that keeps a shard on each trainer instead.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from eagle_rpc.train.distributed import TrainerGroup
from eagle_rpc.train.optimiser import trainable_parameters


class MasterWeights:
    """A draft's trainable weights as the optimiser sees them, bitwise equal on each trainer.

    One collective sums the one buffer of all gradients. With one buffer the rounding of the sum depends on
    its layout alone; with buckets it would depend on timing.
    """

    sharded = False
    """Whether this trainer holds a shard of the weights."""

    def __init__(self, draft: nn.Module, group: TrainerGroup) -> None:
        self._group = group
        # When the optimiser steps, `.grad` is the gradient summed over all trainers.
        self.parameters = trainable_parameters(draft)
        # Whole gradients of this trainer, fp32.
        self._flat, self.gradients = flat_buffer(self.parameters, shards=1)
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients[name]

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """In the body the draft's parameters are whole, and autograd adds to `gradients`. Collective."""
        return contextlib.nullcontext()

    def zero_gradients(self) -> None:
        """Before the first micro-batch of an optimiser step."""
        self._flat.zero_()

    def reduce_gradients(self) -> None:
        """Sums the gradients of all trainers; the objective is normalised already."""
        self._group.sum_(self._flat, "gradients")

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales the reduced gradients to a global norm of at most `max_norm`; returns the norm before."""
        norm = torch.linalg.vector_norm(self._flat)
        self._flat.mul_((max_norm / norm).clamp(max=1.0))
        return norm

    def gathered(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Parameters or their optimiser state by name, made whole one after the other.

        Collective: each trainer passes the same tensors and iterates to the end.
        """
        return iter(tensors.items())

    def shard_of(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """The part of `whole` that this trainer keeps for `parameter`, on its device."""
        return whole.to(parameter.device, copy=True)

    def require_equal(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raises `ConfigError` if trainers would take shards of tensors that differ."""

    def are_finite(self) -> bool:
        """Whether all weights are finite; the same answer on all trainers."""
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
