import torch

from eagle_rpc.draft import chunked_loss
from eagle_rpc.draft.chunked_loss import JudgedRows, head_loss
from eagle_rpc.supervision import StoredLogits, StoredProbs


def case(rows=6, steps=3, hidden=5, vocab=7):
    generator = torch.Generator().manual_seed(0)
    hidden_NSH = torch.randn(rows, steps, hidden, generator=generator, dtype=torch.float64).requires_grad_()
    head_KH = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).requires_grad_()
    targets = StoredProbs(torch.randn(rows, vocab, generator=generator).softmax(dim=-1))
    coefficients_NS = torch.rand(rows, steps, generator=generator, dtype=torch.float64)
    return hidden_NSH, head_KH, targets, coefficients_NS


def plain_loss(hidden_NSH, head_KH, targets, coefficients_NS):
    log_q = (hidden_NSH @ head_KH.T).log_softmax(dim=-1)
    losses_NS = -(targets.probs(slice(None)).double().unsqueeze(1) * log_q).sum(-1)
    return (losses_NS * coefficients_NS).sum(), losses_NS


def soft_cross_entropy(hidden_NSH, head_KH, targets, coefficients_NS):
    rows = JudgedRows(
        targets=targets,
        log_normalizer=torch.empty(len(hidden_NSH)),  # not read
        loss="soft_cross_entropy",
        coefficients=coefficients_NS,
    )
    return head_loss(hidden_NSH, head_KH, rows)


def test_equals_the_plain_formula_whatever_the_chunks(monkeypatch):
    inputs = case()
    expected, expected_losses = plain_loss(*inputs)
    expected_grads = torch.autograd.grad(3 * expected, inputs[:2])
    for rows_per_chunk in (1, 4, 100):
        monkeypatch.setattr(chunked_loss, "_CHUNK_BYTES", rows_per_chunk * 4 * 3 * 7)
        loss, losses, predicted = soft_cross_entropy(*inputs)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(losses, expected_losses.detach())
        assert torch.equal(predicted, (inputs[0] @ inputs[1].T).argmax(dim=-1))
        assert not losses.requires_grad
        for grad, expected_grad in zip(
            torch.autograd.grad(3 * loss, inputs[:2]), expected_grads, strict=True
        ):
            torch.testing.assert_close(grad, expected_grad)


def test_gradients_pass_gradcheck():
    hidden_NSH, head_KH, targets, coefficients_NS = case()
    assert torch.autograd.gradcheck(
        lambda x, w: soft_cross_entropy(x, w, targets, coefficients_NS)[0], (hidden_NSH, head_KH)
    )


def test_large_logits_stay_finite():
    hidden_NSH, head_KH, _, coefficients_NS = case()
    targets = StoredLogits(torch.randn(6, 7, generator=torch.Generator().manual_seed(3)) * 50)
    inputs = (hidden_NSH.detach() * 200, head_KH.detach(), targets, coefficients_NS)
    torch.testing.assert_close(soft_cross_entropy(*inputs)[0], plain_loss(*inputs)[0])


def test_fp32_targets_are_projected_in_fp32_under_autocast():
    seen = []

    class Spy(StoredProbs):
        def probs(self, rows):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().probs(rows)

    hidden_NSH, head_KH, targets, coefficients_NS = case()
    with torch.autocast("cpu", torch.bfloat16):
        _, losses, _ = soft_cross_entropy(
            hidden_NSH.float(), head_KH.float(), Spy(targets.values), coefficients_NS.float()
        )
    assert seen == [False]
    assert losses.dtype == torch.float32
