"""What the supervision needs of a row of full-vocab logits: its argmax, its log-normaliser, its draft-vocab columns.

Legend: N rows, V target vocab, K draft vocab.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class RowsRead(NamedTuple):
    """Of each row of logits."""

    log_normalizer: Tensor  # [N] fp32, logsumexp over V
    argmax: Tensor  # [N] int64, the first of the largest
    selected: Tensor | None  # [N, K] in the logits' dtype


def read_rows(logits_NV: Tensor, columns_K: Tensor | None) -> RowsRead:
    """Reads logits on any device as torch does, through an fp32 copy; `selected` are the `columns_K` (int64), if any."""
    # Exact for every format, and the argmax of bf16 is several times slower on a CPU.
    wide_NV = logits_NV.float()
    selected_NK = None if columns_K is None else logits_NV.index_select(1, columns_K)
    return RowsRead(wide_NV.logsumexp(dim=-1), _argmax(wide_NV), selected_NK)


def _argmax(wide_NV: Tensor) -> Tensor:
    """[N] int64, the first of the largest. NumPy finds it in a sixth of torch's time on a CPU."""
    return (
        torch.from_numpy(wide_NV.numpy().argmax(axis=1))
        if wide_NV.device.type == "cpu"
        else wide_NV.argmax(dim=-1)
    )


def read_rows_fused(logits_NV: Tensor, columns_K: Tensor | None) -> RowsRead:
    """`read_rows` on a GPU in one pass and without a copy, where the log-normaliser is equal to rounding."""
    # Only torch for CUDA brings Triton.
    from eagle_rpc.supervision import rows_kernel

    return RowsRead(*rows_kernel.read_rows(logits_NV, columns_K))


def fused_rows_run(logits_NV: Tensor) -> bool:
    """Whether `read_rows_fused` can be had for logits like these: on a GPU with Triton, which needs a C compiler at its first use."""
    if not logits_NV.is_cuda:
        return False
    try:
        for columns_K in (None, torch.arange(1, device=logits_NV.device)):
            read_rows_fused(logits_NV, columns_K)
    except Exception:
        # No Triton, no C compiler, a refused kernel, a driver: each raises errors of its own, and torch reads rows everywhere.
        logger.warning(
            "logits are read by torch, since Triton does not run here (target.fused_rows)", exc_info=True
        )
        return False
    return True
