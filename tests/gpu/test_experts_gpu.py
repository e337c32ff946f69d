"""The kernels of experts, against a loop over experts, and experts of transformers with them.

Where there is no GPU, Triton's interpreter runs the kernels: `TRITON_INTERPRET=1 python -m pytest
tests/gpu/test_experts_gpu.py` (Triton 3.6 with numpy below 2.4). Legend: N tokens, C choices, E experts, H
hidden, I intermediate width.
"""

from contextlib import nullcontext
from functools import partial

import gpu_marks
import pytest
import torch
from gpu_marks import HOPPER, ON_HOPPER_OR_INTERPRETED, count_multiprocessors, needs_hopper
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from eagle_rpc.target.fused_mlps import FusedMLPs

pytestmark = ON_HOPPER_OR_INTERPRETED
drawn = partial(gpu_marks.drawn, dtype=torch.float16)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    count_multiprocessors(monkeypatch)
    if not HOPPER:
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())


def in_a_loop(hidden_NH, experts_NC, weights_NC, gate_up_EIH, down_EHI):
    sum_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
    for expert in range(len(gate_up_EIH)):
        tokens, choices = (experts_NC == expert).nonzero(as_tuple=True)
        gate, up = F.linear(hidden_NH[tokens].float(), gate_up_EIH[expert].float()).chunk(2, dim=-1)
        results = F.linear(F.silu(gate) * up, down_EHI[expert].float())
        sum_NH.index_add_(0, tokens, results * weights_NC[tokens, choices].float().unsqueeze(-1))
    return sum_NH


def relative(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


SIZES = [  # tokens, choices, experts, hidden, intermediate width
    (1, 2, 8, 16, 8),
    (5, 4, 4, 8, 8),
    (70, 4, 6, 48, 40),
    (300, 2, 3, 24, 16),
    pytest.param(3000, 8, 128, 2048, 768, marks=needs_hopper),
    pytest.param(700, 2, 8, 4096, 1024, marks=needs_hopper),
]


@pytest.mark.parametrize("spread", ["evenly", "all alike"])
@pytest.mark.parametrize(("tokens", "choices", "experts", "hidden", "width"), SIZES)
def test_any_number_of_tokens_and_experts(tokens, choices, experts, hidden, width, spread):
    from eagle_rpc.target.experts import _sum_of_experts

    hidden_NH = drawn(tokens, hidden)
    gate_up_EIH = drawn(experts, 2 * width, hidden, scale=hidden**-0.5)
    down_EHI = drawn(experts, hidden, width, scale=width**-0.5)
    scores = drawn(tokens, experts, dtype=torch.float32)
    if spread == "all alike":
        scores[1:] = scores[0]
    weights_NC, experts_NC = scores.softmax(-1).topk(choices)
    weights_NC = weights_NC.to(hidden_NH.dtype)
    arguments = hidden_NH, experts_NC, weights_NC, gate_up_EIH, down_EHI
    first = _sum_of_experts(*arguments)
    assert relative(first, in_a_loop(*arguments)) < 2e-3
    assert torch.equal(_sum_of_experts(*arguments), first)


def test_each_choice_has_a_place_of_its_own_in_a_tile_of_its_expert():
    from eagle_rpc.target.expert_kernels import place_choices
    from eagle_rpc.target.gated_kernel import TILE_ROWS

    experts_NC = drawn(500, 7, dtype=torch.float32).topk(3).indices
    places_NC, tiles = place_choices(experts_NC, 7)
    assert places_NC.unique().numel() == places_NC.numel()
    assert torch.equal(tiles.expert_of_tile[places_NC.long() // TILE_ROWS], experts_NC.int())
    counts = torch.bincount(experts_NC.flatten(), minlength=7)
    assert tiles.num_tiles.item() == (-(-counts // TILE_ROWS)).sum() <= len(tiles.expert_of_tile)


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 77, 4096])
@torch.no_grad()
def test_experts_of_transformers_give_what_they_gave(tokens):
    config = Qwen3MoeConfig(hidden_size=512, moe_intermediate_size=256, num_experts=16, num_experts_per_tok=4)
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config).to("cuda", torch.bfloat16)
    for weight in experts.parameters():
        weight.normal_(std=0.04)
    hidden_NH = drawn(tokens, 512, dtype=torch.bfloat16)
    weights_NC, experts_NC = torch.rand(tokens, 16, device="cuda").topk(4)
    weights_NC = weights_NC.bfloat16()
    expected = experts(hidden_NH, experts_NC, weights_NC)
    fused = FusedMLPs(nn.ModuleList([experts]).modules())
    assert len(fused) == 1
    with fused.in_place():
        actual = experts(hidden_NH, experts_NC, weights_NC)
    assert relative(actual, expected) < 1e-2
    assert torch.equal(experts(hidden_NH, experts_NC, weights_NC), expected)
