"""Products of the fused step in fp8, as a CPU emulates them: rounded factors, multiplied in the compute dtype.

Legend: N slots, O and I output and input width of a weight.
"""

import pytest
import torch
from support.ttt_cases import Case, case_batch, case_draft, gradients

from eagle_rpc.draft import Objective, ReferenceStep, count_rows
from eagle_rpc.draft.fused import FusedStep, formulas, products
from eagle_rpc.draft.fused.products import GRADIENTS, VALUES, Fp8Products, Products

STEPS = 4
CASES = [
    Case(batch=3, length=64, seed=1),
    Case(batch=3, length=70, packed=True, norm_before_residual=True, blocks=2, seed=2),
    Case(batch=2, length=90, fc_norm=True, norm_output=True, seed=3),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [VALUES, GRADIENTS])
def test_a_matrix_is_rounded_with_one_scale_and_padded_where_it_is_turned(dtype):
    x_NW = normal(37, 96)[:, 16:64]
    straight, scale = formulas.to_fp8(x_NW, dtype, False)
    turned, same_scale = formulas.to_fp8(x_NW, dtype, True)
    assert scale == same_scale == x_NW.abs().max() / torch.finfo(dtype).max
    assert (straight.shape, turned.shape) == ((37, 48), (48, 48))
    assert torch.equal(turned[:, :37].t().double(), straight.double()) and not turned[:, 37:].double().any()
    half_a_step = torch.finfo(dtype).eps / 2
    far = (straight.double() * scale - x_NW).abs() > half_a_step * x_NW.abs() + scale * 2**-9
    assert not far.any()


def test_zeros_stay_zeros_and_broken_values_break_the_product():
    zeros, scale = formulas.to_fp8(torch.zeros(16, 16), VALUES, False)
    assert not zeros.float().any() and scale == 1
    for broken in (float("nan"), float("inf")):
        x_NI, rounding = normal(16, 32), Fp8Products([weight := normal(48, 32, seed=1)])
        x_NI[3, 5] = broken
        rounding.refresh()
        assert not rounding.forward(x_NI, weight)[3].isfinite().any()


@pytest.mark.parametrize("slots", [1, 16, 250])
def test_each_product_is_that_of_the_rounded_factors(slots):
    weight, x_NI, grads_NO = normal(48, 32), normal(slots, 32, seed=1), normal(slots, 48, seed=2)
    rounding, exact = Fp8Products([weight]), Products()
    rounding.refresh()

    def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        values, scale = formulas.to_fp8(x, dtype, False)
        return values.double() * scale

    w8, x8, g8 = rounded(weight, VALUES), rounded(x_NI, VALUES), rounded(grads_NO, GRADIENTS)
    plus, out = normal(slots, 48, seed=3), torch.empty(slots, 48, dtype=torch.float64)
    torch.testing.assert_close(rounding.forward(x_NI, weight), x8 @ w8.t())
    assert rounding.forward(x_NI, weight, plus_NO=plus, out_NO=out) is out
    torch.testing.assert_close(out, plus + x8 @ w8.t())
    torch.testing.assert_close(rounding.input_gradient(grads_NO, weight), g8 @ w8)
    gradient, part = torch.ones(48, 32, dtype=torch.float64), torch.ones(16, 64, dtype=torch.float64)
    rounding.add_weight_gradients([(gradient, grads_NO), (part[:, 32:], grads_NO[:, 16:32])], x_NI)
    torch.testing.assert_close(gradient, 1 + g8.t() @ x8)
    assert distance(part[:, 32:] - 1, grads_NO[:, 16:32].t() @ x_NI) < 0.12
    assert bool((part[:, :32] == 1).all())
    assert 0 < distance(rounding.forward(x_NI, weight), exact.forward(x_NI, weight)) < 0.06


def test_weights_are_read_again_only_when_they_have_changed():
    weight, x_NI = normal(48, 32), normal(20, 32, seed=1)
    rounding = Fp8Products([weight])
    rounding.refresh()
    before = rounding.forward(x_NI, weight)
    weight *= 2
    assert torch.equal(rounding.forward(x_NI, weight), before)
    rounding.refresh()
    torch.testing.assert_close(rounding.forward(x_NI, weight), 2 * before)


def test_odd_widths_and_no_slots_are_multiplied_as_they_are():
    odd, even = normal(50, 32), normal(48, 32)
    rounding, exact = Fp8Products([odd, even]), Products()
    rounding.refresh()
    for weight, slots in ((odd, 20), (even, 0)):
        x_NI, grads_NO = normal(slots, 32), normal(slots, len(weight))
        assert torch.equal(rounding.forward(x_NI, weight), exact.forward(x_NI, weight))
        assert torch.equal(rounding.input_gradient(grads_NO, weight), grads_NO @ weight)
        found, expected = torch.zeros_like(weight), torch.zeros_like(weight)
        rounding.add_weight_gradients([(found, grads_NO)], x_NI)
        exact.add_weight_gradients([(expected, grads_NO)], x_NI)
        assert torch.equal(found, expected)


def exact_and_in_fp8(case: Case, *, recompute_mlp: bool):
    """Losses and gradients of the reference and of the step with rounded factors, both in float64."""
    objective = Objective(steps=STEPS, step_decay=0.8)
    draft, batch = case_draft(case).double(), case_batch(case)
    rounding = FusedStep(draft, objective, dtype=torch.float64, recompute_mlp=recompute_mlp, fp8=True)
    for step in (ReferenceStep(draft, objective, autocast=None), rounding):
        result = step.add_gradients(batch, count_rows(batch, STEPS))
        yield result.loss_sums, gradients(draft)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.seed))
@pytest.mark.parametrize("recompute_mlp", [False, True])
def test_a_step_whose_factors_are_rounded_finely_has_the_exact_gradients(monkeypatch, case, recompute_mlp):
    monkeypatch.setattr(products, "VALUES", torch.float32)
    monkeypatch.setattr(products, "GRADIENTS", torch.float32)
    (exact, exact_grads), (found, grads) = exact_and_in_fp8(case, recompute_mlp=recompute_mlp)
    assert 0 < distance(found, exact) < 1e-6
    for name, grad in grads.items():
        assert 0 < distance(grad, exact_grads[name]) < 1e-5, name


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: str(case.seed))
def test_a_step_in_fp8_has_about_the_loss_and_the_directions_of_the_exact_one(case):
    """About: four steps through a draft with large random weights multiply the error of each product."""
    (exact, exact_grads), (found, grads) = exact_and_in_fp8(case, recompute_mlp=False)
    assert 0 < distance(found, exact) < 1e-2
    for name, grad in grads.items():
        cosine = (grad * exact_grads[name]).sum() / (grad.norm() * exact_grads[name].norm())
        assert cosine > 0.85, name
