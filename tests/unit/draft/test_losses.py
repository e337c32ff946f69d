import contextlib
import math

import pytest
import torch

from eagle_rpc.config.choices import DraftLoss, Encoding, JobName
from eagle_rpc.config.compose import from_sections
from eagle_rpc.config.schema import DraftConfig, JobConfig, SupervisionConfig, TargetConfig
from eagle_rpc.draft.losses import LAMBDA_DECAY, LOSSES, LOWEST_LOG_PROBABILITY, row_losses
from eagle_rpc.errors import ConfigError


def case():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5, 3, 11, generator=generator, dtype=torch.float64)
    targets = 2 * torch.randn(5, 11, generator=generator, dtype=torch.float64)
    # As if the rest of the vocabulary held a third of the probability.
    return logits, targets, targets.logsumexp(dim=-1) + torch.tensor(1.5).log()


def by_hand(loss, logits, targets, log_normalizer, weight=None):
    """The definitions in probabilities; `weight` is that of `lk_lambda`, taken as constant."""
    q, p = logits.softmax(-1), targets.softmax(-1).unsqueeze(1)
    cross_entropy, kl = -(p * q.log()).sum(-1), (p * (p / q).log()).sum(-1)
    acceptance = torch.minimum((targets - log_normalizer[:, None]).exp().unsqueeze(1), q).sum(-1)
    weight = (-LAMBDA_DECAY * acceptance).exp().detach() if weight is None else weight
    hybrid = weight * kl + (1 - weight) * (1 - acceptance)
    mean = (p + q) / 2
    shannon = ((p * (p / mean).log()).sum(-1) + (q * (q / mean).log()).sum(-1)) / 2
    return {
        "soft_cross_entropy": cross_entropy,
        "kl": kl,
        "lk_alpha": -acceptance.log(),
        "lk_lambda": hybrid,
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "total_variation": (p - q).abs().sum(-1) / 2,
        "jensen_shannon": shannon,
    }[loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_equal_their_definitions(loss):
    logits, targets, log_normalizer = case()
    logits.requires_grad_()
    expected = by_hand(loss, logits, targets, log_normalizer)
    losses, gradient = row_losses(loss, logits.detach(), targets, log_normalizer)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_sum_to_zero_over_the_vocabulary(loss):
    _, gradient = row_losses(loss, *case())
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(5, 3, dtype=torch.float64))


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "soft_cross_entropy"])
def test_a_draft_that_equals_the_target_costs_nothing(loss):
    _, targets, _ = case()
    losses, gradient = row_losses(loss, targets.unsqueeze(1), targets, targets.logsumexp(dim=-1))
    torch.testing.assert_close(losses, torch.zeros_like(losses))
    # Total variation has a kink there.
    assert loss == "total_variation" or gradient.abs().max() < 1e-12


MIXED = [name for name, loss in LOSSES.items() if loss.mixes]


@pytest.mark.parametrize("loss", MIXED)
def test_a_mixture_with_kl_equals_its_definition(loss):
    logits, targets, log_normalizer = case()
    logits.requires_grad_()
    parts = [by_hand(name, logits, targets, log_normalizer) for name in ("kl", loss)]
    expected = 0.3 * parts[0] + 0.7 * parts[1]
    losses, gradient = row_losses(loss, logits.detach(), targets, log_normalizer, 0.3)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])


def test_the_symmetric_divergences_are_bounded_where_nothing_overlaps():
    _, targets, log_normalizer = case()
    logits = torch.full((5, 1, 11), -400.0, dtype=torch.float64)
    logits.scatter_(-1, targets.argmin(dim=-1)[:, None, None], 400.0)
    sharp = 100 * targets
    for loss, most in (("total_variation", 1.0), ("jensen_shannon", math.log(2))):
        losses, _ = row_losses(loss, logits, sharp, log_normalizer)
        torch.testing.assert_close(losses, torch.full_like(losses, most))


def test_a_guess_that_the_target_rules_out_has_a_bounded_cost():
    logits, targets, log_normalizer = case()
    targets[:, 4] = -torch.inf
    logits[..., 4] = 50.0
    losses, gradient = row_losses("reverse_kl", logits, targets, log_normalizer)
    torch.testing.assert_close(losses, torch.full_like(losses, -LOWEST_LOG_PROBABILITY), rtol=1e-3, atol=0)
    assert gradient.isfinite().all()


def test_probability_outside_the_draft_vocabulary_is_never_accepted():
    _, targets, log_normalizer = case()
    losses, _ = row_losses("lk_alpha", targets.unsqueeze(1), targets, log_normalizer)
    torch.testing.assert_close(losses, torch.full((5, 1), 1.5, dtype=torch.float64).log())


def test_impossible_target_tokens_are_no_problem():
    logits, targets, log_normalizer = case()
    targets[:, 4] = -torch.inf
    for loss in LOSSES:
        losses, gradient = row_losses(loss, logits, targets, log_normalizer)
        assert losses.isfinite().all() and gradient.isfinite().all(), loss


def test_the_configuration_offers_exactly_these_losses():
    assert tuple(loss.value for loss in DraftLoss) == tuple(LOSSES)


def test_the_configuration_mixes_exactly_the_losses_that_mix():
    for name, loss in LOSSES.items():
        draft = DraftConfig(loss=DraftLoss(name), kl_share=0.5)
        refused = contextlib.nullcontext() if loss.mixes else pytest.raises(ConfigError, match="kl_share")
        with refused:
            from_sections(draft=draft, target=TargetConfig(model="any"), job=JobConfig(name=JobName.evaluate))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_configuration_refuses_probs_exactly_for_losses_that_read_the_full_vocabulary(loss):
    sections = {"draft": DraftConfig(loss=DraftLoss(loss)), "target": TargetConfig(model="any")}
    reads_all = "ACCEPTANCE" in LOSSES[loss].kernel_flags
    refused = pytest.raises(ConfigError, match="encoding=probs") if reads_all else contextlib.nullcontext()
    with refused:
        probs = SupervisionConfig(encoding=Encoding.probs)
        from_sections(job=JobConfig(name=JobName.evaluate), supervision=probs, **sections)
