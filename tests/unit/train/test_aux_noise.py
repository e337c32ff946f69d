"""Noise on captured states: bounded, repeatable, and nowhere but in training."""

import torch
from training_cases import OBJECTIVE, RandomPlan, TableTarget, make_trainer, random_draft, train_config

from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.aux_noise import AuxNoise
from eagle_rpc.train.learner import Learner


def batch():
    return TableTarget().supervise(RandomPlan(batch_size=8).batch(0))


def noise_of(*, step: int = 3, number: int = 1, **changes: int) -> torch.Tensor:
    clean = batch()
    noisy = AuxNoise(0.1, **{"seed": 5, "trainer": 0, **changes}).added_to(clean, step, number)
    return noisy.aux_hidden_states - clean.aux_hidden_states


def test_noise_is_uniform_and_bounded():
    noise, real_BT = noise_of(), batch().tokens.attention_mask.bool()
    assert not noise[~real_BT].any()
    noise = noise[real_BT]
    assert noise.abs().max() <= 0.1 + 1e-6
    torch.testing.assert_close(noise.mean(), torch.tensor(0.0), atol=5e-3, rtol=0)
    torch.testing.assert_close(noise.std(), torch.tensor(0.2 / 12**0.5), atol=5e-3, rtol=0)


def test_noise_is_a_function_of_seed_trainer_step_and_micro_batch():
    assert torch.equal(noise_of(), noise_of())
    others = [noise_of(seed=6), noise_of(trainer=1), noise_of(step=4), noise_of(number=2)]
    assert not any(torch.equal(noise_of(), other) for other in others)


def test_the_callers_batch_stays():
    clean, before = batch(), batch().aux_hidden_states
    noisy = AuxNoise(0.1, seed=0, trainer=0).added_to(clean, 0, 0)
    assert torch.equal(clean.aux_hidden_states, before)
    assert noisy.targets is clean.targets and noisy.aux_hidden_states.dtype is before.dtype


def test_training_sees_noise_and_judging_does_not(tmp_path):
    learners = [
        Learner(
            random_draft(), train_config(aux_noise=size, autocast=None), OBJECTIVE, TrainerGroup(), 40, seed=2
        )
        for size in (0.0, 0.5)
    ]
    judged = []
    for learner in learners:
        sums = learner.empty_sums()
        learner.judge(batch(), sums)
        judged.append(sums.flat.clone())
    assert torch.equal(judged[0], judged[1])
    norms = [learner.learn([batch()]).grad_norm for learner in learners]
    assert not torch.equal(norms[0], norms[1])
    seed = make_trainer(tmp_path, train_config(aux_noise=0.5)).learner._noise._origin
    assert seed == "0 0"
