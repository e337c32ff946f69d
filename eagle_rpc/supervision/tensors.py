"""The shift of the contract, checks, storages, and moves between devices."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.errors import InvalidRequest


def shift_left(x: Tensor, dim: int = 1) -> Tensor:
    """Moves `x` one place to the left along `dim`; the last place becomes zero. Same shape and dtype."""
    shifted = x.new_zeros(x.shape)
    length = x.shape[dim]
    shifted.narrow(dim, 0, length - 1).copy_(x.narrow(dim, 1, length - 1))
    return shifted


def check_dense(name: str, value: Any, dtypes: Collection[torch.dtype]) -> None:
    """Raises `InvalidRequest` unless `value` is a dense tensor with data, of one of the `dtypes`."""
    if not isinstance(value, Tensor):
        raise InvalidRequest(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_meta:
        found = f"{value.layout} on {value.device}"
        raise InvalidRequest(f"{name} must be a dense tensor with data, got {found}")
    if value.dtype not in dtypes:
        raise InvalidRequest(f"{name} must have dtype {' or '.join(map(str, dtypes))}, got {value.dtype}")


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
    # A copy from pageable memory would wait for all earlier work of the stream. Pinned memory belongs to the
    # current device, which a thread takes memory on at its first use.
    with torch.cuda.device(device):
        return (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy of a GPU tensor in pinned memory, complete when the current stream gets there; else `tensor`."""
    if not tensor.is_cuda:
        return tensor
    with torch.cuda.device(tensor.device):
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
