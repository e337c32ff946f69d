import math

import pytest
import torch
from training_cases import random_draft, train_config

from eagle_rpc.config.choices import Optimiser
from eagle_rpc.train.optimiser import DraftOptimiser, trainable_parameters


def optimiser_of(draft, **changes) -> DraftOptimiser:
    return DraftOptimiser(trainable_parameters(draft), train_config(**changes))


def take_steps(draft, optimiser: DraftOptimiser, steps) -> None:
    for step in steps:
        for position, parameter in enumerate(trainable_parameters(draft).values()):
            generator = torch.Generator().manual_seed(100 * step + position)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimiser.step(1e-2)


def test_only_matrices_decay_and_the_embedding_is_left_out():
    draft = random_draft()
    for optimiser in Optimiser:
        parts = optimiser_of(draft, weight_decay=0.1, optimiser=optimiser)._parts
        groups = [group for part in parts for group in part.param_groups]
        for group in groups:
            assert all((group["weight_decay"] == 0.1) == (p.dim() == 2) for p in group["params"])
        optimised = {id(parameter) for group in groups for parameter in group["params"]}
        assert id(draft.embed_tokens.weight) not in optimised
        assert len(optimised) == len(trainable_parameters(draft)) == 13


def test_muon_takes_the_matrices_between_captured_states_and_head():
    draft = random_draft()
    optimiser = optimiser_of(draft, optimiser=Optimiser.muon)
    take_steps(draft, optimiser, range(1))
    by_muon = {path.partition("/")[2] for path in optimiser.tensors() if path.startswith("momentum_buffer/")}
    by_adamw = {path.partition("/")[2] for path in optimiser.tensors() if path.startswith("exp_avg/")}
    assert by_muon | by_adamw == trainable_parameters(draft).keys()
    assert by_adamw == {name for name in by_adamw if "norm" in name} | {"lm_head.weight"}
    assert by_muon >= {"fc.weight", "midlayer.self_attn.q_proj.weight", "midlayer.mlp.down_proj.weight"}


def test_a_trained_embedding_stays_with_adamw_and_does_not_decay():
    draft = random_draft()
    draft.train_embeddings()
    for optimiser in Optimiser:
        parts = optimiser_of(draft, weight_decay=0.1, optimiser=optimiser)._parts
        owners = [
            (type(part), group["weight_decay"])
            for part in parts
            for group in part.param_groups
            if any(parameter is draft.embed_tokens.weight for parameter in group["params"])
        ]
        assert owners == [(torch.optim.AdamW, 0.0)]


def test_an_update_of_muon_is_nearly_orthogonal_and_has_the_size_of_adamws():
    draft = random_draft()
    before = draft.fc.weight.detach().clone()
    take_steps(draft, optimiser_of(draft, optimiser=Optimiser.muon), range(1))
    update = (before - draft.fc.weight.detach()) / 1e-2
    wide = max(update.shape)
    # Five iterations of Newton and Schulz bring singular values near 1; they are scaled by 0.2 sqrt(width).
    singular = torch.linalg.svdvals(update) / (0.2 * math.sqrt(wide))
    assert singular[0] < 1.5 and singular.median() > 0.5
    assert 0.1 < update.square().mean().sqrt() < 0.4


@pytest.mark.parametrize(("fast", "warned"), [("bfloat16", False), ("float32", True)])
def test_muon_on_a_processor_without_bfloat16_is_warned_about(monkeypatch, caplog, fast, warned):
    monkeypatch.setattr("eagle_rpc.train.optimiser.native_dtype", lambda: fast)
    optimiser_of(random_draft(), optimiser=Optimiser.muon)
    assert ("this processor has no instructions" in caplog.text) is warned


@pytest.mark.parametrize("kind", Optimiser)
def test_optimiser_state_survives_a_round_trip(kind):
    straight, resumed = random_draft(), random_draft()
    optimiser = optimiser_of(straight, optimiser=kind)
    take_steps(straight, optimiser, range(2))
    saved = {name: tensor.clone() for name, tensor in optimiser.tensors().items()}
    resumed.load_state_dict(straight.state_dict())
    take_steps(straight, optimiser, range(2, 4))

    again = optimiser_of(resumed, optimiser=kind)
    again.load(saved, lambda whole, _: whole.clone())
    take_steps(resumed, again, range(2, 4))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert saved.keys() == again.tensors().keys()
