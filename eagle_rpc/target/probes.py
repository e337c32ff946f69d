"""What a model has to prove at its start, so that what it is asked for later is exact.

Legend: B batch, T sequence, H target hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eagle_rpc.errors import UnsupportedTarget

# Relative error that rounding explains, when the two sides multiply matrices of different shapes.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
# Times that error for whole models: other attention kernels, and experts that get other rows, round differently, which grows from
# layer to layer.
_WHOLE_MODEL = 5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`; NaN where either holds one."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def check_causal(run: Callable[[Tensor], Tensor], ids_BT: Tensor, name: str) -> None:
    """Raises `UnsupportedTarget` unless what comes later changes nothing in the last hidden states [B, T, H] that `run` gives.

    Then padding on the right needs no mask.
    """
    middle = ids_BT.shape[1] // 2
    expected = run(ids_BT)[:, :middle]
    error = relative_error(run(_with_other(ids_BT, slice(middle, None)))[:, :middle], expected)
    if not error <= _WHOLE_MODEL * ROUNDING[expected.dtype]:
        raise UnsupportedTarget(
            f"{name} must be causal, but what follows a token changes it (relative error {error:.1e})"
        )


def packing_fault(run: Callable[[Tensor, Tensor | None], Tensor], ids_BT: Tensor) -> str | None:
    """Why rows of two chats do not give what the chats give alone; null if they do.

    `run` gives last hidden states [B, T, H] of ids and segment ids, or of ids of one chat a row.
    """
    middle = ids_BT.shape[1] // 2
    chats = slice(0, middle), slice(middle, None)
    segments = (torch.arange(ids_BT.shape[1], device=ids_BT.device) >= middle).long().expand_as(ids_BT)
    packed = run(ids_BT, segments)
    bound = _WHOLE_MODEL * ROUNDING[packed.dtype]
    for chat, other in (chats, chats[::-1]):
        leak = relative_error(run(_with_other(ids_BT, other), segments)[:, chat], packed[:, chat])
        if not leak <= bound:
            return f"one chat changes another by {leak:.1e}"
        error = relative_error(packed[:, chat], run(ids_BT[:, chat], None))
        if not error <= bound:
            return f"a packed chat differs from the chat alone by {error:.1e}"
    return None


def _with_other(ids_BT: Tensor, place: slice) -> Tensor:
    """The same ids with others in `place`."""
    changed_BT = ids_BT.clone()
    changed_BT[:, place] = ids_BT.flip(1)[:, place]
    return changed_BT
