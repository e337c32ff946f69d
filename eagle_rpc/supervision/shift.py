"""The one shift of the EAGLE-3 contract."""

from torch import Tensor


def shift_left(x: Tensor, dim: int = 1) -> Tensor:
    """Moves `x` one place to the left along `dim`; the freed last place is zero. Same shape and dtype."""
    shifted = x.new_zeros(x.shape)
    length = x.shape[dim]
    shifted.narrow(dim, 0, length - 1).copy_(x.narrow(dim, 1, length - 1))
    return shifted
