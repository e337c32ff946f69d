"""Reads full-vocab logits: argmax, log-normaliser and draft-vocab columns of each row.

Legend: N rows, V target vocab, K draft vocab.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class RowsRead(NamedTuple):
    """The figures of N rows of logits."""

    log_normalizer: Tensor  # [N] fp32, logsumexp over V
    argmax: Tensor  # [N] int64, the first of the largest
    selected: Tensor | None  # [N, K] in the logits' dtype


def read_rows(logits_NV: Tensor, columns_K: Tensor | None) -> RowsRead:
    """Reads logits on any device through an fp32 copy; `selected` are the `columns_K` (int64), if any."""
    # The copy is exact. On a CPU the argmax of bf16 is several times slower, and NumPy takes a sixth of
    # torch's time.
    wide_NV = logits_NV.float()
    if wide_NV.device.type == "cpu":
        argmax_N = torch.from_numpy(wide_NV.numpy().argmax(axis=1))
    else:
        argmax_N = wide_NV.argmax(dim=-1)
    selected_NK = None if columns_K is None else logits_NV.index_select(1, columns_K)
    return RowsRead(wide_NV.logsumexp(dim=-1), argmax_N, selected_NK)


def read_rows_fused(logits_NV: Tensor, columns_K: Tensor | None) -> RowsRead:
    """`read_rows` on a GPU in one pass, without a copy. The log-normaliser is the same to rounding."""
    # Triton comes with torch for CUDA only.
    from eagle_rpc.supervision import rows_kernel

    return RowsRead(*rows_kernel.read_rows(logits_NV, columns_K))


def fused_rows_run(logits_NV: Tensor) -> bool:
    """Whether `read_rows_fused` runs for such logits: on a GPU, with Triton and a C compiler."""
    if not logits_NV.is_cuda:
        return False
    try:
        for columns_K in (None, torch.arange(1, device=logits_NV.device)):
            read_rows_fused(logits_NV, columns_K)
    except Exception:
        # Triton, compiler, kernel and driver raise different errors; torch always works.
        logger.warning("Triton does not run here, torch reads logits (target.fused_rows)", exc_info=True)
        return False
    return True
