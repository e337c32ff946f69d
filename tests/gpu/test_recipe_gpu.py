"""Muon, averaged weights and noise on a GPU: as on the CPU to rounding, without waits, the same after a break."""

import torch
from gpu_marks import ON_A_GPU
from gpu_waits import waiting_forbidden
from support.ttt_cases import Case, case_batch, case_draft, on_device

from eagle_rpc.config.choices import DraftLoss, Optimiser
from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.learner import Learner
from eagle_rpc.train.optimiser import DraftOptimiser, trainable_parameters

pytestmark = ON_A_GPU

CASE = Case(head_dim=64, hidden_size=256)
OBJECTIVE = DraftConfig(ttt_steps=3, loss=DraftLoss.jensen_shannon, kl_share=0.3)
TRAIN = TrainConfig(optimiser=Optimiser.muon, ema_decay=0.9, aux_noise=0.1, learning_rate=1e-3)


def learner_of(train: TrainConfig = TRAIN) -> Learner:
    return Learner(case_draft(CASE).cuda(), train, OBJECTIVE, TrainerGroup(), 10, seed=3)


def batches() -> list:
    return [on_device(case_batch(CASE), "cuda")] * 2


def test_an_optimiser_step_never_waits_for_the_gpu():
    learner, twice = learner_of(), batches()
    learner.learn(twice)  # compiles kernels and allocates states
    with waiting_forbidden():
        outcome = learner.learn(twice)
    assert outcome.grad_norm.isfinite() and learner.steps_done == 2


def test_a_step_of_muon_is_that_of_a_cpu_to_rounding():
    updates = []
    for device in ("cpu", "cuda"):
        draft = case_draft(CASE).to(device)
        parameters = trainable_parameters(draft)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for number, parameter in enumerate(parameters.values()):
            draw = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(device)
        DraftOptimiser(parameters, TRAIN).step(1e-2)
        updates.append({name: (parameters[name].detach() - before[name]).cpu() for name in parameters})
    for name, update in updates[0].items():
        # Newton and Schulz iterate in bfloat16.
        torch.testing.assert_close(updates[1][name], update, rtol=0.1, atol=0.05 * float(update.abs().max()))


def test_a_restored_learner_goes_on_as_if_it_had_not_stopped():
    straight, resumed, twice = learner_of(), learner_of(), batches()
    straight.learn(twice)
    resumed.load(straight.snapshot(), straight.steps_done)
    assert resumed.digest() == straight.digest()
    for learner in (straight, resumed):
        learner.learn(twice)
    states = [dict(learner.weights()) | dict(learner.optimiser_state()) for learner in (straight, resumed)]
    for name, tensor in states[0].items():
        # Muon's bfloat16 enlarges the rounding of gradients that are summed in another order.
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-2, atol=1e-4, msg=name)


def test_the_fused_step_judges_the_average_and_then_trains_on():
    learner, twice = learner_of(), batches()
    for _ in range(3):
        learner.learn(twice)
    plain, averaged, again = (learner.empty_sums() for _ in range(3))
    learner.judge(twice[0], plain)
    with learner.averaged():
        learner.judge(twice[0], averaged)
    learner.judge(twice[0], again)
    assert torch.equal(plain.flat, again.flat) and not torch.equal(plain.flat, averaged.flat)


def test_noise_is_the_same_in_every_run():
    norms = [learner_of().learn(batches()).grad_norm for _ in range(2)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=0)
