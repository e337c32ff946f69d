"""The kernel that gates inside a matrix product, against two products, and whole MLPs with it.

Where there is no GPU, Triton's interpreter runs the kernel: `TRITON_INTERPRET=1 python -m pytest
tests/gpu/test_gated_product_gpu.py` (Triton 3.6 with numpy below 2.4). Legend: N rows, H hidden, I
intermediate width.
"""

from functools import partial

import gpu_marks
import pytest
import torch
from gpu_marks import DEVICE_OF_KERNELS, ON_HOPPER_OR_INTERPRETED, count_multiprocessors, needs_hopper
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from eagle_rpc.target.fused_mlps import FusedMLPs

pytestmark = ON_HOPPER_OR_INTERPRETED
drawn = partial(gpu_marks.drawn, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    count_multiprocessors(monkeypatch)


def in_two_products(hidden_NH, weight_2IH):
    gate, up = (F.linear(hidden_NH, weight) for weight in weight_2IH)
    return F.silu(gate) * up


# The interpreter multiplies the bits of bf16.
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=needs_hopper)])
@pytest.mark.parametrize(
    ("rows", "width", "hidden"),
    [
        (0, 24, 8),
        (1, 128, 64),
        (128, 128, 128),
        (5, 24, 8),
        (300, 200, 72),
        pytest.param(4000, 1376, 512, marks=needs_hopper),
    ],
)
def test_products_of_any_size(dtype, rows, width, hidden):
    from eagle_rpc.target.gated_kernel import gated_product

    hidden_NH = drawn(rows, hidden, dtype=dtype)
    weight_2IH = drawn(2, width, hidden, dtype=dtype, scale=2 * hidden**-0.5)
    torch.testing.assert_close(
        gated_product(hidden_NH, weight_2IH), in_two_products(hidden_NH, weight_2IH), rtol=2e-2, atol=2e-2
    )


def test_gates_of_any_size():
    from eagle_rpc.target.gated_kernel import gated_product

    hidden_NH, weight_2IH = torch.zeros(128, 64), torch.zeros(2, 128, 64)
    gates = torch.tensor([0.0, 1.0, -1.0, 20.0, -20.0, 90.0, -90.0, 1e4, -1e4])
    hidden_NH[: len(gates), 0], weight_2IH[0, :, 0] = gates, 1.0
    hidden_NH[:, 1], weight_2IH[1, :, 1] = 3.0, 1.0
    hidden_NH, weight_2IH = (one.to(DEVICE_OF_KERNELS, torch.float16) for one in (hidden_NH, weight_2IH))
    gated_NI = gated_product(hidden_NH, weight_2IH)
    torch.testing.assert_close(gated_NI, in_two_products(hidden_NH, weight_2IH), rtol=1e-2, atol=1e-6)


@needs_hopper
@pytest.mark.parametrize("rows", [1, 77, 4096])
@torch.no_grad()
def test_an_mlp_of_transformers_gives_what_it_gave(rows):
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816)
    mlp = LlamaMLP(config).to("cuda", torch.bfloat16)
    hidden = drawn(2, rows, 1024)
    expected = mlp(hidden)
    fused = FusedMLPs(nn.ModuleList([mlp]).modules())
    assert len(fused) == 1
    with fused.in_place():
        actual = mlp(hidden)
    assert float((actual.float() - expected.float()).norm() / expected.float().norm()) < 1e-2
    assert torch.equal(mlp(hidden), expected)


@needs_hopper
@torch.no_grad()
def test_freed_weights_do_not_stay_in_torchs_cache():
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336)
    with torch.device("meta"):
        mlps = [LlamaMLP(config).to(torch.bfloat16) for _ in range(3)]
    for mlp in mlps:
        for weight in mlp.to_empty(device="cuda").parameters():
            weight.normal_(std=0.02)
    assert len(FusedMLPs(mlps)) == 3
    # A gate or up weight takes 112 MiB.
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < 2**26
