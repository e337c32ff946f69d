"""Master weights, optimiser state and reduced gradients in parts, one on each trainer, by torch's FSDP2.

`fully_shard` makes the draft's parameters DTensors that hold a part of the rows, and gives and takes back whole ones by
`unshard` and `reshard`. Its hooks are not used. They would gather before a module's `forward` and reduce after its
backward, but a step of training-time test calls several methods of the draft many times and reads the head's weight
without calling it, the fused step has no autograd to hook into, and a reduction per backward would cost traffic for every
micro-batch. So the collectives stand where the learner calls them: one gather before the micro-batches (none for the fused
step, which gathers its copies in the compute dtype after the optimiser's step), one reduction after them.

On each trainer lie, for P parameters and n trainers: 12 P / n bytes of weights and moments, 4 P / n of reduced gradients,
4 P of gradients that micro-batches add to, and the weights as the step reads them: 2 P for the fused step, 4 P during a
step for the reference.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from eagle_rpc.train.distributed import TrainerGroup, tensors_digest
from eagle_rpc.train.master_weights import all_finite, flat_buffer
from eagle_rpc.train.optimiser import trainable_parameters


class ShardedWeights:
    """`MasterWeights` of which each trainer holds the rows that `torch.chunk` would give it.

    Trainers end with the weights that replicated ones end with, but for the rounding of the global norm, whose sum runs
    over parts. Raises `ConfigError` if drafts differ, or if trainers share a GPU.
    """

    in_parts = True

    def __init__(self, draft: nn.Module, group: TrainerGroup) -> None:
        self._group = group
        trainable = trainable_parameters(draft)
        self.require_alike(trainable, "the draft at the start")
        frozen = {parameter for parameter in draft.parameters() if not parameter.requires_grad}
        # FSDP2 works on the current device, wherever the parameters are.
        with torch.cuda.device_of(next(iter(trainable.values()))):
            self._mesh = group.mesh(next(iter(trainable.values())).device)
            self._draft: FSDPModule = fully_shard(
                draft, mesh=self._mesh, reshard_after_forward=False, ignored_params=frozen
            )
        self.parameters = trainable_parameters(draft)
        self._flat, self._padded = flat_buffer(self.parameters, group.size)
        self.gradients = {
            name: self._padded[name][: len(parameter)] for name, parameter in self.parameters.items()
        }
        # The n-th part of every padded gradient.
        self._reduced = torch.zeros(len(self._flat) // group.size, device=self._flat.device)
        sizes = [padded.numel() // group.size for padded in self._padded.values()]
        self._parts = dict(zip(self._padded, self._reduced.split(sizes), strict=True))
        for name, parameter in self.parameters.items():
            parameter.grad = self._as_gradient(self._parts[name], parameter)

    def _as_gradient(self, part: Tensor, parameter: DTensor) -> DTensor:
        local = parameter.to_local()
        return DTensor.from_local(
            part[: local.numel()].view_as(local),
            self._mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        with self._group.bounded("the gathering of weights"), torch.cuda.device_of(self._flat):
            self._draft.unshard()
        try:
            for name, parameter in trainable_parameters(self._draft).items():
                parameter.grad = self.gradients[name]
            yield
        finally:
            self._draft.reshard()

    def zero_gradients(self) -> None:
        self._flat.zero_()

    def reduce_gradients(self) -> None:
        for name, part in self._parts.items():
            self._group.sum_parts(part, self._padded[name].view(-1), f"gradients of {name}")

    def clip_gradients(self, max_norm: float) -> Tensor:
        squared = torch.linalg.vector_norm(self._reduced).double().square()
        norm = self._group.sum_(squared, "squared gradient norms").sqrt().float()
        self._reduced.mul_((max_norm / norm).clamp(max=1.0))
        return norm

    def whole_of(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        with self._group.bounded("the gathering of a checkpoint"):
            return tensor.detach().full_tensor()

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One whole tensor at a time lies on the device."""
        kept = {}
        for name, tensor in tensors.items():
            whole = self.whole_of(tensor)
            if self._group.is_primary:
                kept[name] = whole.cpu()
        return kept

    def part_of(self, whole: Tensor, parameter: DTensor) -> Tensor:
        whole = whole.to(parameter.device, copy=True)
        if whole.shape != parameter.shape:  # a count of steps
            return whole
        return distribute_tensor(whole, self._mesh, parameter.placements, src_data_rank=None)

    def require_alike(self, tensors: Mapping[str, Tensor], what: str) -> None:
        self._group.require_equal({what: tensors_digest(tensors.items())})

    def are_finite(self) -> bool:
        mine = all_finite(parameter.to_local() for parameter in self.parameters.values())
        return not self._group.any_(not mine, "whether weights are finite")
