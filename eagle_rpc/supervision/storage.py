"""Where a tensor's bytes are."""

from torch import Tensor


def own_storage(tensor: Tensor) -> Tensor:
    """`tensor` without gradient, contiguous and alone in its storage: RPC ships storages, not views."""
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        return tensor.clone()
    return tensor
