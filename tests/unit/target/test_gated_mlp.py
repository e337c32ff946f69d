"""MLPs whose gate is applied inside their product, with a stand-in for the kernel, which needs a GPU.

Legend: N rows, H hidden, I intermediate width.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from eagle_rpc.config.choices import CompileMode
from eagle_rpc.target import fused_mlps, gated_mlp
from eagle_rpc.target.fused_mlps import FusedMLPs
from eagle_rpc.target.model import HFEagle3TargetModel


class MLP(nn.Module):
    def __init__(
        self,
        activation=F.silu,
        most=float("inf"),
        bias=False,
        dtype=torch.bfloat16,
        up_dtype=None,
        hidden=16,
        width=24,
    ):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias, dtype=dtype)
        self.up_proj = nn.Linear(hidden, width, bias=bias, dtype=up_dtype or dtype)
        self.down_proj = nn.Linear(width, hidden, bias=bias, dtype=dtype)
        self.activation, self.most = activation, most

    def forward(self, hidden):
        gated = self.activation(self.gate_proj(hidden).clamp(max=self.most)) * self.up_proj(hidden)
        return self.down_proj(gated)


class Calls(list):
    """Shapes that the stand-in was called with."""

    def gated_product(self, hidden_NH, weight_2IH):
        self.append(tuple(hidden_NH.shape))
        return F.silu(F.linear(hidden_NH, weight_2IH[0])) * F.linear(hidden_NH, weight_2IH[1])


@pytest.fixture
def kernel(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(fused_mlps, "_is_hopper", lambda device: True)
    monkeypatch.setattr(gated_mlp, "DTYPES", (torch.bfloat16, torch.float16, torch.float32))
    monkeypatch.setitem(
        sys.modules, "eagle_rpc.target.gated_kernel", SimpleNamespace(gated_product=calls.gated_product)
    )
    return calls


@torch.no_grad()
def test_the_fused_forward_runs_only_in_place_and_gives_what_the_modules_give(kernel):
    mlp, hidden = MLP(), torch.randn(2, 5, 16, dtype=torch.bfloat16)
    weights = [part.weight.clone() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    expected = mlp(hidden)
    fused = FusedMLPs(nn.ModuleList([mlp]).modules())
    assert len(fused) == 1
    kernel.clear()
    with fused.in_place():
        assert torch.equal(mlp(hidden), expected)
    assert kernel == [(10, 16)]
    assert torch.equal(mlp(hidden), expected)
    assert kernel == [(10, 16)]
    for part, weight in zip((mlp.gate_proj, mlp.up_proj, mlp.down_proj), weights, strict=True):
        assert torch.equal(part.weight, weight)


def test_gate_and_up_weights_are_not_held_twice(kernel):
    mlp = MLP()
    FusedMLPs([mlp])
    storages = {part.weight.untyped_storage().data_ptr() for part in (mlp.gate_proj, mlp.up_proj)}
    assert storages == {mlp.gate_up_weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": F.gelu},
        {"activation": F.relu},
        {"most": 7.0},
        {"most": 50.0},
        {"bias": True},
        {"dtype": torch.float64},
        {"up_dtype": torch.float16},
        {"hidden": 12},
        {"width": 20},
    ],
    ids=lambda changes: " ".join(
        f"{name} {getattr(value, '__name__', value)}" for name, value in changes.items()
    ),
)
def test_what_is_no_plain_silu_gate_or_does_not_fit_the_kernel_stays_as_it_is(kernel, changes, caplog):
    mlp = MLP(**changes)
    assert not FusedMLPs([mlp])
    assert not hasattr(mlp, "gate_up_weight") and not caplog.records


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_any_size_are_probed_where_the_format_holds_them(kernel, dtype, scale):
    plain, clamped = (
        MLP(dtype=dtype, hidden=512, width=256),
        MLP(dtype=dtype, hidden=512, width=256, most=10.0),
    )
    for mlp in (plain, clamped):
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight.data *= scale
    assert len(FusedMLPs([plain])) == 1
    assert len(FusedMLPs([clamped])) == 0


class Quantised(nn.Linear):
    pass


class QuantisedWeight(torch.Tensor):
    pass


def with_quantised_module(mlp):
    mlp.up_proj = Quantised(16, 24, bias=False, dtype=torch.bfloat16)


def with_quantised_weight(mlp):
    mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight.data.as_subclass(QuantisedWeight))


@pytest.mark.parametrize("quantise", [with_quantised_module, with_quantised_weight])
def test_quantised_products_are_not_touched(kernel, quantise, caplog):
    mlp = MLP()
    quantise(mlp)
    assert not FusedMLPs([mlp])
    assert not kernel and not caplog.records


def test_without_a_hopper_gpu_nothing_is_fused():
    assert not FusedMLPs([MLP()])


def test_a_kernel_that_does_not_run_is_reported_once_and_leaves_nothing_behind(kernel, caplog, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no C compiler")

    monkeypatch.setitem(sys.modules, "eagle_rpc.target.gated_kernel", SimpleNamespace(gated_product=fail))
    mlps = [MLP(), MLP()]
    assert not FusedMLPs(mlps)
    assert len(caplog.records) == 1 and "target.fused_mlp" in caplog.text
    assert not any(hasattr(mlp, "gate_up_weight") for mlp in mlps)
    hidden = torch.randn(3, 16, dtype=torch.bfloat16)
    assert mlps[0](hidden).shape == hidden.shape


class Pair(MLP):
    """Wants batches and returns more than a tensor."""

    def forward(self, hidden):
        _batch, _length, _width = hidden.shape
        return super().forward(hidden), None


def test_an_odd_module_does_not_keep_others_from_being_fused(kernel, caplog):
    assert len(FusedMLPs([MLP(), Pair(), MLP()])) == 2
    assert "MLPs run as their modules do" in caplog.text


def test_a_forward_that_somebody_replaced_stays(kernel):
    mlp = MLP()
    mlp.forward = mlp.forward
    assert not FusedMLPs([mlp])


@torch.no_grad()
def test_the_modules_own_forward_comes_back_after_an_error(kernel):
    mlp = MLP()
    fused = FusedMLPs([mlp])
    with pytest.raises(ValueError), fused.in_place():
        raise ValueError
    assert "forward" not in vars(mlp)


@torch.no_grad()
def test_two_targets_may_share_a_model(kernel):
    mlp, hidden = MLP(), torch.randn(3, 16, dtype=torch.bfloat16)
    expected = mlp(hidden)
    both = FusedMLPs([mlp]), FusedMLPs([mlp])
    for fused in both:
        with fused.in_place():
            assert torch.equal(mlp(hidden), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_target_runs_its_mlps_fused_where_they_are_gated_by_silu(kernel, make_model, family):
    plain = HFEagle3TargetModel(make_model(family), fused_mlp=False)
    ids = torch.randint(97, (2, 9))
    mask = torch.ones_like(ids)
    expected = plain.generate_batch(ids, mask, mask)
    assert not kernel and "fused MLPs" not in plain.model_info().form
    target = HFEagle3TargetModel(make_model(family))
    kernel.clear()
    output = target.generate_batch(ids, mask, mask)
    is_gated_by_silu = family != "gemma2"
    assert kernel == [(18, 32)] * (7 if is_gated_by_silu else 0)
    assert ("7 fused MLPs" in target.model_info().form) is is_gated_by_silu
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)


def test_compiled_layers_hold_the_fused_mlps_and_share_their_graph(kernel, make_model, trace_only):
    target = HFEagle3TargetModel(make_model("llama"))
    before = counters["stats"]["unique_graphs"]
    target.compile(["2x8"], packed=False, mode=CompileMode.default)
    assert counters["stats"]["unique_graphs"] == before + 1
    kernel.clear()
    ids = torch.randint(97, (2, 8))
    target.generate_batch(ids, torch.ones_like(ids), torch.ones_like(ids))
    assert kernel == [(16, 32)] * 7
