import pytest
import torch

from eagle_rpc.config.choices import DraftLoss
from eagle_rpc.draft.losses import LAMBDA_DECAY, LOSSES, row_losses


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
    return {
        "soft_cross_entropy": cross_entropy,
        "kl": kl,
        "lk_alpha": -acceptance.log(),
        "lk_lambda": hybrid,
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


@pytest.mark.parametrize("loss", ["kl", "lk_alpha", "lk_lambda"])
def test_a_draft_that_equals_the_target_costs_nothing(loss):
    _, targets, _ = case()
    losses, gradient = row_losses(loss, targets.unsqueeze(1), targets, targets.logsumexp(dim=-1))
    torch.testing.assert_close(losses, torch.zeros_like(losses))
    assert gradient.abs().max() < 1e-12


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
