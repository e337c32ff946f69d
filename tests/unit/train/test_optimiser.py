import math

import pytest
import torch
from training_cases import random_draft, train_config

from eagle_rpc.train.optimiser import (
    learning_rate,
    load_optimiser_tensors,
    make_optimiser,
    optimiser_tensors,
    trainable_parameters,
)


def test_the_rate_climbs_then_falls_along_a_cosine():
    config = train_config(learning_rate=8.0, warmup_share=0.25, min_learning_rate_share=0.5)
    rates = [learning_rate(step, 8, config) for step in range(8)]
    assert rates[:2] == [4.0, 8.0]
    assert rates[4] == pytest.approx(6.0)  # half of the way from 8 to 4
    assert rates[2] == pytest.approx(4 + 2 * (1 + math.cos(math.pi / 6)))
    assert rates[7] == pytest.approx(4.0)
    assert rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize(("share", "first"), [(0.0, 0.5), (1.0, 0.5)])
def test_the_rate_without_warm_up_and_with_nothing_else(share, first):
    config = train_config(learning_rate=1.0, warmup_share=share, min_learning_rate_share=0.0)
    assert learning_rate(0, 2, config) == pytest.approx(first)


def test_only_matrices_decay_and_the_embedding_is_left_out():
    draft = random_draft()
    matrices, vectors = make_optimiser(draft, train_config(weight_decay=0.1)).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {parameter.dim() for parameter in matrices["params"]} == {2}
    assert {parameter.dim() for parameter in vectors["params"]} == {1}
    optimised = {id(parameter) for parameter in matrices["params"] + vectors["params"]}
    assert id(draft.embed_tokens.weight) not in optimised
    assert len(optimised) == len(trainable_parameters(draft)) == 13


def test_optimiser_state_survives_a_round_trip():
    def train(draft, optimiser, steps):
        for step in steps:
            for position, parameter in enumerate(trainable_parameters(draft).values()):
                parameter.grad = torch.full_like(parameter, math.sin(step + position))
            optimiser.step()

    config = train_config()
    straight, resumed = random_draft(), random_draft()
    optimiser = make_optimiser(straight, config)
    train(straight, optimiser, range(2))
    saved = {
        name: tensor.clone()
        for name, tensor in optimiser_tensors(optimiser, trainable_parameters(straight)).items()
    }
    resumed.load_state_dict(straight.state_dict())
    train(straight, optimiser, range(2, 4))

    again = make_optimiser(resumed, config)
    load_optimiser_tensors(again, trainable_parameters(resumed), saved, lambda whole, _: whole.clone())
    train(resumed, again, range(2, 4))
    assert {key.partition("/")[0] for key in saved} == {"exp_avg", "exp_avg_sq", "step"}
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
