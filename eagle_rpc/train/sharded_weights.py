"""Master weights, optimiser state and reduced gradients in shards, one on each trainer, by torch's FSDP2.

`fully_shard` turns the draft's parameters into DTensors; `unshard` and `reshard` make them whole and sharded
again. Its hooks, which gather before a module's `forward` and reduce after its backward, are not used,
because

* a step of training-time test calls several methods of the draft many times, and reads the head's weight;
* the fused step has no autograd that could run hooks;
* a reduction per backward would cost traffic for each micro-batch.

The learner calls the collectives instead: one gather before the micro-batches (the fused step instead gathers
its copies, in the compute dtype, after the optimiser step) and one reduction after them.

docs/optimiser_step.md lists the bytes that each trainer holds.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from eagle_rpc.supervision import tensors_digest
from eagle_rpc.train.distributed import TrainerGroup
from eagle_rpc.train.master_weights import MasterWeights, all_finite, flat_buffer
from eagle_rpc.train.optimiser import trainable_parameters


class ShardedWeights(MasterWeights):
    """`MasterWeights` sharded along dim 0 as by `torch.chunk`.

    Training gives the weights of `MasterWeights` but for the rounding of the global norm, which is summed
    over shards. Raises `ConfigError` if drafts differ, or if trainers share a GPU.
    """

    sharded = True

    def __init__(self, draft: nn.Module, group: TrainerGroup) -> None:
        self._group = group
        trainable = trainable_parameters(draft)
        self.require_equal(trainable, "the draft at the start")
        frozen = {parameter for parameter in draft.parameters() if not parameter.requires_grad}
        # FSDP2 works on the current device, not on that of the parameters.
        with torch.cuda.device_of(next(iter(trainable.values()))):
            self._mesh = group.mesh(next(iter(trainable.values())).device)
            self._draft: FSDPModule = fully_shard(
                draft, mesh=self._mesh, reshard_after_forward=False, ignored_params=frozen
            )
        self._module = draft
        self.parameters = trainable_parameters(draft)
        self._flat, self._padded = flat_buffer(self.parameters, shards=group.size)
        self.gradients = {name: self._padded[name][: len(p)] for name, p in self.parameters.items()}
        # This trainer's shard of each padded gradient.
        self._reduced = torch.zeros(len(self._flat) // group.size, device=self._flat.device)
        sizes = [padded.numel() // group.size for padded in self._padded.values()]
        self._shards = dict(zip(self._padded, self._reduced.split(sizes), strict=True))
        for name, parameter in self.parameters.items():
            parameter.grad = self._as_gradient(self._shards[name], parameter)

    def _as_gradient(self, shard: Tensor, parameter: nn.Parameter) -> DTensor:
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        return DTensor.from_local(
            shard[: local.numel()].view_as(local),
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
            for name, parameter in trainable_parameters(self._module).items():
                parameter.grad = self.gradients[name]
            yield
        finally:
            self._draft.reshard()

    def reduce_gradients(self) -> None:
        for name, shard in self._shards.items():
            self._group.sum_shards(shard, self._padded[name].view(-1), f"gradients of {name}")

    def clip_gradients(self, max_norm: float) -> Tensor:
        squared = torch.linalg.vector_norm(self._reduced).double().square()
        norm = self._group.sum_(squared, "squared gradient norms").sqrt().float()
        self._reduced.mul_((max_norm / norm).clamp(max=1.0))
        return norm

    def gathered(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                with self._group.bounded("the gathering of a checkpoint"):
                    tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
            yield name, tensor

    def shard_of(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        assert isinstance(parameter, DTensor)
        whole = whole.to(parameter.device, copy=True)
        if whole.shape != parameter.shape:  # the optimiser's count of steps
            return whole
        return distribute_tensor(whole, self._mesh, parameter.placements, src_data_rank=None)

    def require_equal(self, tensors: Mapping[str, Tensor], what: str) -> None:
        self._group.require_equal({what: tensors_digest(tensors.items())})

    def are_finite(self) -> bool:
        shards = [p.to_local() for p in self.parameters.values() if isinstance(p, DTensor)]
        return not self._group.any_(not all_finite(shards), "whether weights are finite")
