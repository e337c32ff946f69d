"""The kernel that reads rows of logits, against the plain reading.

Where there is no GPU, Triton's interpreter runs it: `TRITON_INTERPRET=1 python -m pytest
tests/gpu/test_rows_kernel_gpu.py` (Triton 3.6 with numpy below 2.4).
"""

import pytest
import torch
from gpu_marks import INTERPRETED

from eagle_rpc.supervision.rows import read_rows, read_rows_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device or Triton's interpreter"
    ),
]


def logits_of(rows: int, vocab: int, dtype: torch.dtype, scale: float = 5.0) -> torch.Tensor:
    logits = scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))
    return logits.to(DEVICE, dtype)


def assert_reads_as_torch(logits: torch.Tensor, columns: torch.Tensor | None = None) -> None:
    from eagle_rpc.supervision import rows_kernel

    log_normalizer, argmax, selected = rows_kernel.read_rows(logits, columns)
    plain = read_rows(logits, columns)
    exact = logits.double().logsumexp(dim=-1)
    torch.testing.assert_close(log_normalizer.double(), exact, rtol=1e-6, atol=2e-6)
    assert log_normalizer.dtype == torch.float32
    assert torch.equal(argmax, plain.argmax)
    assert (selected is None and columns is None) or torch.equal(selected, plain.selected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 97, 4096, 10000, 128256])
def test_rows_of_any_width_and_format(dtype, vocab):
    columns = (
        torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[: vocab // 3 + 1]
        .sort()
        .values.to(DEVICE)
    )
    assert_reads_as_torch(logits_of(5, vocab, dtype), columns)
    assert_reads_as_torch(logits_of(5, vocab, dtype))


def test_the_first_of_equal_logits_is_the_argmax():
    logits = torch.zeros(6, 9000, device=DEVICE, dtype=torch.bfloat16)
    for row, places in enumerate(([], [8999], [4095, 4096], [4096, 8192], [17, 18, 8999], [0, 8999])):
        logits[row, places] = 3.0
    assert read_rows(logits, None).argmax.tolist() == [0, 8999, 4095, 4096, 17, 0]
    assert_reads_as_torch(logits)


def test_logits_of_minus_infinity_and_of_any_size():
    logits = logits_of(4, 9000, torch.float32, scale=100.0)
    logits[0, :5000] = float("-inf")
    logits[1] -= 1e6
    logits[2] += 1e6
    assert_reads_as_torch(logits)


def test_rows_apart_from_each_other_and_no_rows():
    wide = logits_of(6, 5000, torch.bfloat16)
    columns = torch.arange(0, 4000, 3, device=DEVICE)
    assert_reads_as_torch(wide[::2, :4000], columns)
    assert_reads_as_torch(wide[:0], columns)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter is slow")
def test_more_logits_than_32_bits_count():
    logits = torch.zeros(17000, 128256, device=DEVICE, dtype=torch.bfloat16)
    logits[-1, 77] = 1.0
    fused = read_rows_fused(logits, None)
    assert fused.argmax[-1] == 77 and not fused.argmax[:-1].any()
