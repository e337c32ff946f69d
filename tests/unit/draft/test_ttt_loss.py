import pytest
import torch
from draft_cases import DRAFT_VOCAB, HIDDEN, batch_of, gradients, random_chat, supervised_batch, tiny_draft
from slow_ttt import slow_ttt

from eagle_rpc.draft import Objective, UnrollMemory, count_rows, simulated_accept_length, ttt_loss
from eagle_rpc.supervision import DraftHead, ProjectedTargets, StoredProbs, TokenBatch

STEPS, DECAY = 4, 0.7
OBJECTIVE = Objective(steps=STEPS, step_decay=DECAY)
# Rotary tables and step weights are fp32 in the product.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def chats() -> list[dict]:
    return [
        random_chat(9, [2, 3, 4, 5, 7], seed=3),
        random_chat(6, [0, 3, 4], seed=4),
        random_chat(7, [1, 2, 5], seed=5),
    ]


def run(draft, batch, denominators=None):
    """Loss and gradients; the batch's own counts are the denominators unless given."""
    draft.zero_grad(set_to_none=True)
    denominators = count_rows(batch, STEPS) if denominators is None else denominators
    result = ttt_loss(draft, batch, OBJECTIVE, denominators)
    result.loss.backward()
    return result, gradients(draft)


FORMS = {
    "eagle3": {},
    "norm_before_residual": {"norm_before_residual": True},
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "norm_before_fc": {"norm_before_fc": True, "norm_output": True, "norm_before_residual": True},
    "all_norms": {"norm_before_fc": True, "fc_norm": True},
    "two_layers": {"num_layers": 2, "norm_output": True},
    "window": {"sliding_window": 5},
    "window_shorter_than_the_steps": {"sliding_window": 2, "num_layers": 2},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_equal_a_slow_implementation(form, packed):
    draft = tiny_draft(**FORMS[form])
    first, second, third = chats()
    rows = [[first, second], [third]] if packed else [[first], [second], [third]]
    result, grads = run(draft, batch_of(rows, length=17 if packed else 10, packed=packed))

    draft.zero_grad(set_to_none=True)
    expected = slow_ttt(draft, chats(), STEPS, DECAY)
    expected["loss"].backward()
    torch.testing.assert_close(result.loss, expected["loss"], **CLOSE)
    torch.testing.assert_close(result.loss_sums, expected["sums"], **CLOSE)
    assert result.rows.tolist() == expected["rows"].tolist()
    assert result.correct.tolist() == expected["correct"].tolist()
    assert grads.keys() == gradients(draft).keys()
    for name, grad in gradients(draft).items():
        torch.testing.assert_close(grads[name], grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_steps_differ_from_each_other_in_the_slow_implementation():
    expected = slow_ttt(tiny_draft(), chats(), STEPS, DECAY)
    means = expected["sums"] / expected["rows"]
    assert len({round(float(mean), 3) for mean in means}) == STEPS


def test_gradient_equals_finite_differences():
    draft = tiny_draft()
    batch = batch_of([[chat] for chat in chats()], length=9)
    _, grads = run(draft, batch)
    weight = draft.midlayer.self_attn.k_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    losses = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * direction
            losses.append(ttt_loss(draft, batch, OBJECTIVE, count_rows(batch, STEPS)).loss.item())
            weight -= step * direction
    slope = (losses[0] - losses[1]) / 2e-5
    assert slope == pytest.approx(
        (grads["midlayer.self_attn.k_proj.weight"] * direction).sum().item(), rel=1e-5
    )


def test_rows_are_counted_by_hand():
    # Row 0 can only be judged at step 0, row 2 at steps 0 to 2, row 5 at all four.
    batch = batch_of([[random_chat(8, [0, 2, 5], seed=1)]], length=8)
    assert count_rows(batch, 4).tolist() == [3, 2, 2, 1]


def test_packed_rows_count_from_the_start_of_their_chat():
    packed = batch_of(
        [[random_chat(4, [0, 2], seed=1), random_chat(5, [0, 1, 3], seed=2)]], length=12, packed=True
    )
    assert count_rows(packed, 4).tolist() == [5, 3, 2, 1]


def test_packed_chats_train_as_separate_ones():
    draft = tiny_draft()
    separate, separate_grads = run(draft, batch_of([[chat] for chat in chats()], length=9))
    packed, packed_grads = run(draft, batch_of([chats()], length=25, packed=True))
    torch.testing.assert_close(packed.loss, separate.loss, **CLOSE)
    for name in ("rows", "correct", "accepted", "drafts"):
        assert getattr(packed, name).tolist() == getattr(separate, name).tolist()
    for name, grad in separate_grads.items():
        torch.testing.assert_close(packed_grads[name], grad, **CLOSE)


def test_padding_and_what_stands_in_it_change_nothing():
    draft = tiny_draft()
    tight, tight_grads = run(draft, batch_of([[chat] for chat in chats()], length=9))
    padded, padded_grads = run(draft, batch_of([[chat] for chat in chats()], length=21, filler=7))
    torch.testing.assert_close(padded.loss, tight.loss)
    for name, grad in tight_grads.items():
        torch.testing.assert_close(padded_grads[name], grad)


def test_split_work_adds_up_to_the_whole():
    draft = tiny_draft()
    rows = [[chat] for chat in chats()]
    whole_batch, halves = (
        batch_of(rows, length=9),
        [batch_of(rows[:1], length=9), batch_of(rows[1:], length=9)],
    )
    denominators = sum(count_rows(half, STEPS) for half in halves)
    assert denominators.tolist() == count_rows(whole_batch, STEPS).tolist()
    whole, whole_grads = run(draft, whole_batch)
    parts = [run(draft, half, denominators) for half in halves]
    torch.testing.assert_close(sum(part.loss for part, _ in parts), whole.loss)
    for name, grad in whole_grads.items():
        torch.testing.assert_close(sum(grads[name] for _, grads in parts), grad)
    for name in ("loss_sums", "rows", "correct", "accepted", "drafts"):
        torch.testing.assert_close(sum(getattr(part, name) for part, _ in parts), getattr(whole, name))


def test_rows_of_the_loss_mask_without_supervision_change_only_the_draft_counts():
    draft = tiny_draft()
    chat = random_chat(8, [1, 3, 5], seed=1)
    wider = chat | {"loss_mask": torch.tensor([0, 0, 1, 1, 1, 1, 1, 0])}
    result, grads = run(draft, batch_of([[chat]], length=8))
    wider_result, wider_grads = run(draft, batch_of([[wider]], length=8))
    assert torch.equal(wider_result.loss, result.loss)
    assert all(torch.equal(wider_grads[name], grad) for name, grad in grads.items())
    assert result.drafts.tolist() == [3, 0, 0, 0]
    assert wider_result.drafts.tolist() == [5, 4, 3, 2]


def test_projected_targets_train_as_their_stored_probabilities():
    draft, batch = tiny_draft(), batch_of([[chat] for chat in chats()], length=9)
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(len(batch.supervised_rows), 5, generator=generator)
    projected = ProjectedTargets(
        hidden_NH, DraftHead(weight=torch.randn(DRAFT_VOCAB, 5, generator=generator))
    )
    batch.targets = projected
    loss = run(draft, batch)[0].loss
    batch.targets = StoredProbs(projected.probs(slice(None)))
    torch.testing.assert_close(run(draft, batch)[0].loss, loss)


def test_outputs_that_no_row_judges_do_not_reach_the_loss():
    """The last token's hidden state is only read by slots that no supervised row judges."""
    draft = tiny_draft()
    clean, poisoned = (batch_of([[random_chat(6, [1, 2, 3], seed=8)]], length=6) for _ in range(2))
    poisoned.aux_hidden_states[0, 4:] = 1e3
    torch.testing.assert_close(run(draft, clean)[0].loss, run(draft, poisoned)[0].loss)


def test_no_rows_give_zero_loss_and_zero_gradients():
    result, grads = run(tiny_draft(), batch_of([[random_chat(6, [], seed=1)]], length=6))
    assert result.loss.item() == 0
    assert result.rows.tolist() == result.drafts.tolist() == [0] * STEPS
    for name, grad in grads.items():
        assert grad is not None, name
        assert not grad.any(), name


def test_the_embedding_stays_frozen():
    draft = tiny_draft()
    _, grads = run(draft, batch_of([[chat] for chat in chats()], length=9))
    assert draft.embed_tokens.weight.grad is None
    assert "embed_tokens.weight" not in grads
    assert all(grad.abs().sum() > 0 for grad in grads.values())


def test_a_row_outside_the_draft_vocabulary_is_never_correct():
    draft, batch = tiny_draft(), batch_of([[chat] for chat in chats()], length=9)
    before, _ = run(draft, batch)
    assert before.correct.sum() > 0
    batch.argmax = torch.full_like(batch.argmax, -1)
    after, _ = run(draft, batch)
    assert after.correct.tolist() == after.accepted.tolist() == [0] * STEPS
    assert after.rows.tolist() == before.rows.tolist()


class ScriptedDraft:
    """Stands in for a draft whose guesses are known: it predicts the id that it reads."""

    def __init__(self) -> None:
        self.lm_head = torch.nn.Linear(DRAFT_VOCAB, DRAFT_VOCAB, bias=False)
        torch.nn.init.eye_(self.lm_head.weight)

    def fuse(self, aux_BT3H):
        return torch.zeros(*aux_BT3H.shape[:2], DRAFT_VOCAB)

    def advance(self, ids_BT, hidden_BTH, positions_BT, memory):
        memory = memory.layers[0]
        guesses = memory.asking(torch.nn.functional.one_hot(ids_BT % DRAFT_VOCAB, DRAFT_VOCAB).float())
        memory.attend(guesses[:, None], hidden_BTH[:, None], hidden_BTH[:, None])
        return guesses

    @staticmethod
    def norm(x):
        return x

    carried, unroll_memory = norm, UnrollMemory


def test_accepted_and_drafts_on_a_hand_case():
    # The draft guesses r + 2 at row r. The target agrees at rows 1, 2 and 4, not at row 3. Row 5 lies in the
    # loss mask but is not supervised: the target's most likely token there is outside the draft vocabulary.
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    loss_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])
    tokens = TokenBatch(input_ids=ids, attention_mask=torch.ones_like(ids), loss_mask=loss_mask)
    targets = torch.nn.functional.one_hot(torch.tensor([3, 4, 0, 6]), DRAFT_VOCAB).float()
    batch = supervised_batch(tokens, torch.zeros(1, 8, 3 * HIDDEN), torch.tensor([1, 2, 3, 4]), targets)
    result = ttt_loss(ScriptedDraft(), batch, Objective(steps=3, step_decay=1.0), count_rows(batch, 3))
    assert result.rows.tolist() == [4, 4, 3]
    assert result.correct.tolist() == [3, 3, 2]
    # Slots 1..5 start a draft of one, 1..4 of two, 1..3 of three.
    assert result.drafts.tolist() == [5, 4, 3]
    # Slots 1, 2 and 4 begin well; slot 2 fails at row 3 and slot 4 at row 5; slot 1 gets to row 2 and fails
    # at row 3.
    assert result.accepted.tolist() == [3, 1, 0]
    assert simulated_accept_length(result.accepted, result.drafts).item() == pytest.approx(1 + 3 / 5 + 1 / 4)


def test_accept_length_of_nothing_is_one():
    assert simulated_accept_length(torch.zeros(3), torch.zeros(3)).item() == 1


def test_bf16_autocast_stays_close_to_full_precision():
    draft, batch = tiny_draft(torch.float32), batch_of([[chat] for chat in chats()], length=9)
    batch.aux_hidden_states = batch.aux_hidden_states.bfloat16()
    exact, exact_grads = run(draft, batch)
    with torch.autocast("cpu", torch.bfloat16):
        draft.zero_grad(set_to_none=True)
        rough = ttt_loss(draft, batch, OBJECTIVE, count_rows(batch, STEPS))
    rough.loss.backward()
    assert rough.loss.dtype == torch.float32
    assert rough.loss.item() == pytest.approx(exact.loss.item(), rel=0.03)
    for name, grad in gradients(draft).items():
        assert grad.dtype == torch.float32
        assert (grad - exact_grads[name]).norm() < 0.1 * exact_grads[name].norm(), name


def test_validation_without_gradients_gives_the_same_numbers():
    draft, batch = tiny_draft(), batch_of([[chat] for chat in chats()], length=9)
    trained, _ = run(draft, batch)
    with torch.no_grad():
        judged = ttt_loss(draft, batch, OBJECTIVE, count_rows(batch, STEPS))
    assert not judged.loss.requires_grad
    assert judged.loss.item() == trained.loss.item()
