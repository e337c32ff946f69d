"""The fused step in float64 on the CPU, where its formulas run as they are written, against autograd over the
reference.
"""

import pytest
import torch
from support.ttt_cases import Case, case_batch, case_draft, gradients

from eagle_rpc.draft import LOSSES, Objective, ReferenceStep, count_rows
from eagle_rpc.draft.fused import FusedStep, aux_fusion, unroll
from eagle_rpc.errors import ConfigError

CASES = [
    Case(),
    Case(packed=True, seed=1),
    Case(norm_before_residual=True, projected=True, seed=2),
    Case(packed=True, norm_before_residual=True, batch=3, seed=3),
    Case(heads=3, key_heads=3, head_dim=24, seed=4),
    Case(heads=6, key_heads=1, batch=1, length=31, seed=5),
    Case(heads=5, key_heads=1, supervised_share=0.1, seed=6),
    Case(packed=True, heads=2, key_heads=1, length=40, supervised_share=1.0, seed=7),
    Case(fc_norm=True, norm_output=True, blocks=1, seed=8),
    Case(norm_before_fc=True, norm_output=True, norm_before_residual=True, packed=True, seed=9),
    Case(aux_layers=5, norm_before_fc=True, fc_norm=True, seed=10),
    Case(aux_layers=1, fc_norm=True, batch=3, seed=11),
    Case(window=6, length=24, seed=12),
    Case(window=9, length=40, packed=True, blocks=2, norm_output=True, seed=13),
]
FIGURES = ("loss", "loss_sums", "rows", "correct", "accepted", "drafts")


def both(
    case: Case,
    *,
    steps: int = 4,
    recompute_mlp: bool = False,
    loss: str = "soft_cross_entropy",
    kl_share: float = 0.0,
    train_embeddings: bool = False,
):
    """Results and gradients of reference and fused step."""
    objective = Objective(steps=steps, step_decay=0.7, loss=loss, kl_share=kl_share)
    draft, batch = case_draft(case).double(), case_batch(case)
    if train_embeddings:
        draft.train_embeddings()
    fused = FusedStep(draft, objective, dtype=torch.float64, recompute_mlp=recompute_mlp)
    for step in (ReferenceStep(draft, objective, autocast=None), fused):
        yield step.add_gradients(batch, count_rows(batch, steps)), gradients(draft)


def assert_equal(results) -> None:
    (expected, expected_grads), (result, grads) = results
    for name in FIGURES:
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), msg=lambda text, name=name: f"{name}: {text}"
        )
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.seed))
def test_loss_figures_and_gradients_equal_autograd(case):
    assert_equal(both(case))


@pytest.mark.parametrize("number", [0, 3, 6, 8])
def test_a_trained_embedding_gets_the_gradients_of_autograd(number):
    results = list(both(CASES[number], train_embeddings=True))
    assert all("embed_tokens.weight" in grads and grads["embed_tokens.weight"].any() for _, grads in results)
    assert_equal(results)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_number_of_steps(steps):
    assert_equal(both(CASES[1], steps=steps))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss):
    assert_equal(both(CASES[2], loss=loss))
    if LOSSES[loss].mixes:
        assert_equal(both(CASES[2], loss=loss, kl_share=0.4))


@pytest.mark.parametrize("steps_of_a_product", [1, 2, 3])
def test_weight_gradients_may_be_formed_after_any_number_of_steps(monkeypatch, steps_of_a_product):
    monkeypatch.setattr(unroll, "_SLOTS_OF_A_PRODUCT", steps_of_a_product * CASES[0].batch * CASES[0].length)
    assert_equal(both(CASES[0], steps=5))


def test_the_feed_forward_block_may_be_recomputed():
    assert_equal(both(CASES[0], recompute_mlp=True))
    assert_equal(both(CASES[8], recompute_mlp=True))


def test_captured_states_may_be_normed_in_pieces(monkeypatch):
    monkeypatch.setattr(aux_fusion, "_SLOTS_OF_A_PIECE", 7)
    assert_equal(both(CASES[10]))


def test_rows_may_come_in_any_chunks(monkeypatch):
    for rows in (1, 5):
        monkeypatch.setattr("eagle_rpc.draft.fused.step._CHUNK_BYTES", rows * 4 * 61 * 8)
        assert_equal(both(CASES[0]))


def test_gradients_add_up_over_micro_batches():
    objective = Objective(steps=3, step_decay=0.7)
    draft, batches = case_draft(Case()).double(), [case_batch(Case(seed=seed)) for seed in (1, 2)]
    denominators = sum(count_rows(batch, 3) for batch in batches)
    sums = []
    for step in (
        ReferenceStep(draft, objective, autocast=None),
        FusedStep(draft, objective, dtype=torch.float64, recompute_mlp=False),
    ):
        for batch in batches:
            step.add_gradients(batch, denominators)
        sums.append(gradients(draft))
    for name, grad in sums[0].items():
        torch.testing.assert_close(sums[1][name], grad)


def test_judging_gives_the_loss_and_no_gradients():
    objective = Objective(steps=4, step_decay=0.7)
    draft, batch = case_draft(Case()).double(), case_batch(Case())
    denominators = count_rows(batch, 4)
    step = FusedStep(draft, objective, dtype=torch.float64, recompute_mlp=False)
    judged = step.judge(batch, denominators)
    assert gradients(draft) == {}
    assert judged.loss == step.add_gradients(batch, denominators).loss


def test_changed_weights_count_once_they_are_refreshed():
    objective = Objective(steps=2, step_decay=0.7)
    draft, batch = case_draft(Case()).double(), case_batch(Case())
    denominators = count_rows(batch, 2)
    step = FusedStep(draft, objective, dtype=torch.float64, recompute_mlp=False)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1.1)
    step.refresh_weights()
    torch.testing.assert_close(
        step.judge(batch, denominators).loss,
        ReferenceStep(draft, objective, autocast=None).judge(batch, denominators).loss,
    )


def test_no_rows_give_zero_loss_and_zero_gradients():
    (_, _), (result, grads) = both(Case(supervised_share=0.0))
    assert result.loss == 0
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("case", [Case(num_layers=2), Case(window=2)], ids=["layers", "window"])
def test_forms_that_it_does_not_unroll_are_refused(case):
    objective = Objective(steps=3, step_decay=0.7)
    with pytest.raises(ConfigError, match="the fused step must have a draft of one layer"):
        FusedStep(case_draft(case), objective, dtype=torch.float64, recompute_mlp=False)


def test_the_cpu_keeps_the_reference():
    assert not FusedStep.supports(case_draft(Case()), torch.bfloat16)
