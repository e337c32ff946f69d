"""The fused step in bf16 on a GPU, against float64: it may be as far off as autograd over the reference in bf16 is."""

import copy

import pytest
import torch
from gpu_marks import ON_A_GPU
from gpu_waits import waiting_forbidden
from support.ttt_cases import Case, case_batch, case_draft, gradients, on_device

from eagle_rpc.config.choices import StepWeighting
from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.draft import Objective, ReferenceStep, count_rows
from eagle_rpc.draft.fused import FusedStep
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.learner import Learner

pytestmark = ON_A_GPU

STEPS = 7
CASES = [
    Case(heads=4, key_heads=1, head_dim=64, hidden_size=256, batch=3, length=200, seed=1),
    Case(heads=4, key_heads=2, head_dim=128, hidden_size=256, batch=2, length=333, packed=True, seed=2),
    Case(
        heads=2,
        key_heads=2,
        head_dim=256,
        hidden_size=256,
        batch=1,
        length=257,
        norm_before_residual=True,
        seed=3,
    ),
    Case(
        heads=6,
        key_heads=2,
        head_dim=80,
        hidden_size=320,
        batch=4,
        length=65,
        packed=True,
        projected=True,
        seed=4,
    ),
    Case(
        heads=7, key_heads=1, head_dim=96, hidden_size=384, batch=2, length=128, supervised_share=0.1, seed=5
    ),
    Case(heads=8, key_heads=2, head_dim=128, hidden_size=512, batch=2, length=1030, seed=6),
    Case(heads=4, key_heads=1, head_dim=64, hidden_size=256, batch=3, length=700, blocks=1, seed=7),
    Case(heads=4, key_heads=2, head_dim=128, hidden_size=256, batch=2, length=900, blocks=4, seed=8),
    Case(heads=6, key_heads=2, head_dim=80, hidden_size=320, length=800, blocks=3, packed=True, seed=9),
    Case(heads=2, key_heads=2, head_dim=256, hidden_size=256, batch=2, length=600, blocks=2, seed=10),
    Case(head_dim=64, hidden_size=256, length=300, fc_norm=True, norm_output=True, seed=11),
    Case(
        head_dim=128,
        hidden_size=384,
        length=500,
        packed=True,
        aux_layers=5,
        norm_before_fc=True,
        norm_output=True,
        norm_before_residual=True,
        seed=12,
    ),
    Case(head_dim=64, hidden_size=256, length=700, window=100, seed=13),
    Case(head_dim=128, hidden_size=384, length=900, window=64, blocks=3, seed=14),
    Case(
        head_dim=80, hidden_size=320, length=600, window=8, blocks=2, packed=True, norm_output=True, seed=15
    ),
    Case(head_dim=256, hidden_size=256, length=300, window=7, packed=True, seed=16),
]


def distance(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[7]], ids=lambda case: str(case.seed))
def test_a_trained_embedding_is_as_close_to_float64_as_in_the_reference(case):
    assert_as_close(case, recompute_mlp=False, train_embeddings=True)


@pytest.mark.parametrize("recompute_mlp", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.seed))
def test_as_close_to_float64_as_the_reference_in_bf16(case, recompute_mlp):
    assert_as_close(case, recompute_mlp=recompute_mlp)


def assert_as_close(case, *, recompute_mlp, train_embeddings=False):
    draft, batch = case_draft(case).cuda(), on_device(case_batch(case), "cuda")
    if train_embeddings:
        draft.train_embeddings()
    objective, denominators = Objective(steps=STEPS, step_decay=0.8), count_rows(batch, STEPS)
    exact_draft = copy.deepcopy(draft).double()
    exact = ReferenceStep(exact_draft, objective, autocast=None).add_gradients(batch, denominators)
    exact_grads = gradients(exact_draft)
    ReferenceStep(draft, objective, autocast=torch.bfloat16).add_gradients(batch, denominators)
    rough_grads = gradients(draft)
    fused_step = FusedStep(draft, objective, dtype=torch.bfloat16, recompute_mlp=recompute_mlp)
    fused = fused_step.add_gradients(batch, denominators)
    fused_grads = gradients(draft)

    assert distance(fused.loss_sums, exact.loss_sums) < 1e-2
    assert torch.equal(fused.rows, exact.rows) and torch.equal(fused.drafts, exact.drafts)
    errors = {
        name: (distance(fused_grads[name], grad), distance(rough_grads[name], grad))
        for name, grad in exact_grads.items()
    }
    for name, (fused_error, rough_error) in errors.items():
        assert fused_error < 1.25 * rough_error + 1e-3, name


@pytest.mark.parametrize("blocks", [None, 0])
def test_no_rows_give_zero_gradients(blocks):
    case = Case(head_dim=64, supervised_share=0.0, blocks=blocks)
    draft, batch = case_draft(case).cuda(), on_device(case_batch(case), "cuda")
    step = FusedStep(draft, Objective(steps=3, step_decay=0.8), dtype=torch.bfloat16, recompute_mlp=False)
    assert step.add_gradients(batch, count_rows(batch, 3)).loss == 0
    assert all(not grad.any() for grad in gradients(draft).values())


@pytest.mark.parametrize("packed", [False, True])
def test_an_optimiser_step_never_waits_for_the_gpu(packed):
    case = Case(head_dim=64, hidden_size=256, blocks=2, packed=packed)
    draft = case_draft(case).cuda()
    draft.train_embeddings()
    objective = DraftConfig(ttt_steps=STEPS, step_weighting=StepWeighting.learned)
    learner = Learner(draft, TrainConfig(), objective, TrainerGroup(), total_steps=10)
    batches = [on_device(case_batch(case), "cuda")] * 2
    learner.learn(batches)  # compiles kernels and allocates the optimiser's state
    with waiting_forbidden():
        outcome = learner.learn(batches)
    assert outcome.grad_norm > 0 and learner.steps_done == 2
