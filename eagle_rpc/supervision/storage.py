"""Where a tensor's bytes are, and how they get to another device without anybody waiting."""

import torch
from torch import Tensor


def own_storage(tensor: Tensor) -> Tensor:
    """`tensor` without gradient, contiguous and alone in its storage: RPC ships storages, not views."""
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        return tensor.clone()
    return tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` there; what goes from the CPU to a GPU is in the order of the current stream, and the CPU goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    # From memory that may be paged out a copy waits for everything before it.
    return (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy of a GPU's tensor in pinned memory, complete once the current stream has come so far; others as they are."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
