"""The shift of the contract, storages, and moves between devices."""

import torch
from torch import Tensor


def shift_left(x: Tensor, dim: int = 1) -> Tensor:
    """Moves `x` one place to the left along `dim`; the last place becomes zero. Same shape and dtype."""
    shifted = x.new_zeros(x.shape)
    length = x.shape[dim]
    shifted.narrow(dim, 0, length - 1).copy_(x.narrow(dim, 1, length - 1))
    return shifted


def own_storage(tensor: Tensor) -> Tensor:
    """`tensor` without gradient, contiguous, with a storage of its own: RPC sends storages, not views."""
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        return tensor.clone()
    return tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy to a GPU is queued on the current stream; the CPU does not wait for it."""
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from pageable memory would wait for all earlier work of the stream.
    return (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy of a GPU tensor in pinned memory, complete when the current stream gets there; else `tensor`."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
