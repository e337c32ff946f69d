"""An exponential moving average of the weights, which validation and exports take in place of the last ones."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights:
    """`average = decay * average + (1 - decay) * weights` after each step, in fp32; it begins with the weights.

    With sharded parameters each trainer averages its shard.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimiser step."""
        self._average(_local(self.tensors), _local(self._parameters), 0)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While the body runs, the parameters have the averages, and the averages their weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(_local(self.tensors), _local(self._parameters), strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """This trainer's shards, or whole tensors if they are not sharded; they share memory with `tensors`."""
    shards = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values())
    return [shard.detach() for shard in shards]
