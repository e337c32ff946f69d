"""Chats in packed rows train as they do alone: over a whole epoch, and without a trace of each other.

Legend: N supervised rows, T sequence.
"""

import pytest
import torch
from draft_cases import (
    DRAFT_VOCAB,
    HIDDEN,
    VOCAB,
    batch_of,
    gradients,
    random_chat,
    supervised_batch,
    tiny_draft,
)

from eagle_rpc.data import BatchPlan, ChatDataset, Example
from eagle_rpc.draft import Objective, count_rows, ttt_loss
from eagle_rpc.supervision import TokenBatch, shifted_loss_mask

STEPS, DECAY = 5, 0.7
OBJECTIVE = Objective(steps=STEPS, step_decay=DECAY)
# Rotary tables and step weights are fp32 in the product.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
LENGTHS = [3, 4, 11, 7, 5, 16, 9, 3, 12, 6, 8]  # the shortest end before the last step


def dataset() -> ChatDataset:
    generator = torch.Generator().manual_seed(11)
    return ChatDataset(
        [
            Example(
                torch.randint(0, VOCAB, (length,), generator=generator),
                torch.rand(length, generator=generator) < 0.8,
            )
            for length in LENGTHS
        ],
        max_length=16,
    )


def supervised(tokens: TokenBatch):
    """Outputs of a target that looks at single tokens: the same wherever a chat stands."""
    generator = torch.Generator().manual_seed(12)
    aux = torch.randn(VOCAB, 3 * HIDDEN, generator=generator, dtype=torch.float64)
    probs = (3 * torch.randn(VOCAB, DRAFT_VOCAB, generator=generator)).softmax(dim=-1)
    rows_N = shifted_loss_mask(tokens).flatten().nonzero().squeeze(1)
    return supervised_batch(
        tokens, aux[tokens.input_ids], rows_N, probs[tokens.input_ids.flatten()[rows_N + 1]]
    )


def train_an_epoch(draft, *, num_ranks: int, batch_size: int, packed_length: int | None):
    """Sums over all micro-batches of all ranks, with the denominators of the whole epoch, as one optimiser
    step has them.
    """
    plans = [
        BatchPlan(
            dataset(),
            batch_size=batch_size,
            rank=rank,
            num_ranks=num_ranks,
            packed_length=packed_length,
            endless=False,
        )
        for rank in range(num_ranks)
    ]
    batches = [
        supervised(plan.batch(number))
        for plan in plans
        for number in range(plan.batches_per_epoch)
        if plan.sequences(number)
    ]
    denominators = sum(count_rows(batch, STEPS) for batch in batches)
    draft.zero_grad(set_to_none=True)
    results = [ttt_loss(draft, batch, OBJECTIVE, denominators) for batch in batches]
    sum(result.loss for result in results).backward()
    sums = {
        name: sum(getattr(result, name).detach() for result in results)
        for name in ("loss", "loss_sums", "rows", "correct", "accepted", "drafts")
    }
    return sums, {name: grad.clone() for name, grad in gradients(draft).items()}


@pytest.mark.parametrize(
    ("num_ranks", "batch_size", "packed_length"), [(1, 1, 84), (1, 2, 30), (2, 1, 21), (1, 3, 16)]
)
def test_an_epoch_of_packed_rows_has_the_objective_and_gradients_of_one_chat_a_row(
    num_ranks, batch_size, packed_length
):
    draft = tiny_draft()
    # All eleven chats in one micro-batch: every chat once, no row repeated.
    expected, expected_grads = train_an_epoch(draft, num_ranks=1, batch_size=len(LENGTHS), packed_length=None)
    packed, grads = train_an_epoch(
        draft, num_ranks=num_ranks, batch_size=batch_size, packed_length=packed_length
    )
    assert expected["rows"].min() > 0
    for name, value in expected.items():
        torch.testing.assert_close(
            packed[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("judged", [0, 1, 2])
def test_a_chat_is_judged_without_reading_its_neighbours(judged):
    """The objective of one chat's rows has no gradient at any other token of the packed row, bit for bit."""
    draft = tiny_draft()
    rows = [[4, 5, 6], [0, 1], [0, 2, 3]]
    chats = [
        random_chat(length, rows[n] if n == judged else [], seed=n) for n, length in enumerate((8, 3, 6))
    ]
    batch = batch_of([chats], length=20, packed=True)
    batch.aux_hidden_states.requires_grad_()
    result = ttt_loss(draft, batch, OBJECTIVE, count_rows(batch, STEPS))
    result.loss.backward()
    read_T = batch.aux_hidden_states.grad[0].abs().sum(dim=-1) > 0
    first = (0, 8, 11)[judged]
    expected = torch.zeros(20, dtype=torch.bool)
    expected[first : first + rows[judged][-1] + 1] = True
    assert torch.equal(read_T, expected)


def test_no_draft_of_a_packed_chat_reaches_into_the_next():
    """A run of supervised tokens over the boundary of two chats counts as two runs."""
    whole = [random_chat(5, [0, 1, 2, 3], seed=1), random_chat(4, [0, 1, 2], seed=2)]
    batch = batch_of([whole], length=9, packed=True)
    batch.tokens.loss_mask[:] = 1
    result = ttt_loss(tiny_draft(), batch, OBJECTIVE, count_rows(batch, STEPS))
    assert result.drafts.tolist() == [4 + 3, 3 + 2, 2 + 1, 1, 0]
    assert result.rows.tolist() == [7, 5, 3, 1, 0]
