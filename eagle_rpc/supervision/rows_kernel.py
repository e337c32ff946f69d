"""Triton kernel of `rows.read_rows`.

One program reads one row: maximum and sum of exponentials in one pass over its blocks, then its selected
columns, which are still in the L2 cache. Legend: N rows, V target vocab or a block of it, K draft vocab or a
block of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _NUM_WARPS = 4096, 8
# In place of minus infinity, whose differences are NaN.
_LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _read_rows_kernel(  # type: ignore[no-untyped-def]
    logits, columns, log_normalizers, argmaxes, selected, vocab, num_columns, row_stride,
    HAS_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    places = tl.arange(0, BLOCK)
    largest, best = _LOWEST, 0
    sums_V = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        logits_V = tl.load(logits + start + places, start + places < vocab, other=float("-inf")).to(
            tl.float32
        )
        block_largest = tl.max(logits_V, axis=0)
        # The first of equals wins, within a block and between blocks.
        if block_largest > largest:
            best = start + tl.argmax(logits_V, axis=0)
        new_largest = tl.maximum(largest, block_largest)
        sums_V = sums_V * tl.exp(largest - new_largest) + tl.exp(logits_V - new_largest)
        largest = new_largest
    tl.store(log_normalizers + row, largest + tl.log(tl.sum(sums_V, axis=0)))
    tl.store(argmaxes + row, best.to(tl.int64))  # type: ignore[attr-defined]
    if HAS_COLUMNS:
        selected += row * num_columns
        for start in range(0, num_columns, BLOCK):
            mask_K = start + places < num_columns
            columns_K = tl.load(columns + start + places, mask_K, other=0)
            tl.store(selected + start + places, tl.load(logits + columns_K, mask_K), mask_K)


def read_rows(logits_NV: Tensor, columns_K: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `rows.read_rows`; the logits' last dimension is contiguous."""
    assert logits_NV.stride(1) == 1, "the kernel reads rows that are contiguous"
    rows, vocab = logits_NV.shape
    log_normalizer_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    argmax_N = torch.empty(rows, dtype=torch.int64, device=logits_NV.device)
    selected_NK = None if columns_K is None else logits_NV.new_empty(rows, len(columns_K))
    if rows:
        # Triton launches on the current device, not on that of the tensors.
        with torch.cuda.device_of(logits_NV):
            _read_rows_kernel[(rows,)](
                logits_NV,
                argmax_N if columns_K is None else columns_K,
                log_normalizer_N,
                argmax_N,
                argmax_N if selected_NK is None else selected_NK,
                vocab,
                0 if columns_K is None else len(columns_K),
                logits_NV.stride(0),
                HAS_COLUMNS=columns_K is not None,
                BLOCK=_BLOCK,
                num_warps=_NUM_WARPS,
            )
    return log_normalizer_N, argmax_N, selected_NK
