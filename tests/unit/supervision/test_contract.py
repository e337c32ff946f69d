"""Supervision against independent computations from full logits.

Legend: B batch, T sequence, H target hidden, V target vocab, K draft vocab.
"""

import weakref

import pytest
import torch

from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision import (
    ENCODINGS,
    DraftHead,
    DraftVocabOnDevice,
    TargetOutput,
    TokenBatch,
    VocabMapping,
    compute_supervision,
    decode_supervision,
    encode_supervision,
    shift_left,
    shifted_loss_mask,
)

V, H = 29, 8
MAPPING = VocabMapping.from_token_ids(torch.tensor([17, 3, 4, 28, 9, 11, 20, 0, 5, 6, 7, 24]), V)
K = len(MAPPING)


class LinearTarget:
    """Random hidden states and a plain head; what it returned is kept for the independent computation."""

    def __init__(self, batch, length, dtype=torch.float32, seed=0, num_aux_layers=3):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(V, H, generator=generator).to(dtype)
        self.hidden = torch.randn(batch, length, H, generator=generator).to(dtype)
        self.aux = torch.randn(batch, length, num_aux_layers * H, generator=generator).to(dtype)

    def generate_batch(self, input_ids, attention_mask, loss_mask, **packing):
        return TargetOutput(
            aux_hidden_states=self.aux,
            last_hidden_state=self.hidden,
            project=lambda hidden_NH: hidden_NH @ self.weight.T,
        )

    def draft_head(self):
        return DraftHead(weight=self.weight[MAPPING.selected_token_ids])


def tokens_of(lengths=(16, 11, 2), length=16, seed=1, packed=False):
    generator = torch.Generator().manual_seed(seed)
    attention_mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    return TokenBatch(
        input_ids=torch.randint(0, V, (len(lengths), length), generator=generator),
        attention_mask=attention_mask.long(),
        loss_mask=((torch.rand(len(lengths), length, generator=generator) < 0.7) & attention_mask).long(),
        segment_ids=(torch.arange(length)[None] >= 6).long().expand(len(lengths), -1).contiguous()
        if packed
        else None,
    )


def encoded_and_decoded(target, tokens, encoding, rows="position_mask", chunk_rows=3):
    output = target.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask)
    vocab = DraftVocabOnDevice.of(MAPPING, torch.device("cpu"))
    encoded = encode_supervision(output, tokens, vocab, encoding=encoding, rows=rows, chunk_rows=chunk_rows)
    head = target.draft_head() if ENCODINGS[encoding].needs_head else None
    return encoded, decode_supervision(encoded, tokens, head)


def expected_rows(target, tokens, rows):
    """Position by position: what row t of each sequence must carry, or None."""
    logits_BTV = target.hidden @ target.weight.T
    selected = MAPPING.selected_token_ids.tolist()
    found = {}
    batch, length = tokens.shape
    for b in range(batch):
        for t in range(length - 1):
            supervised = bool(tokens.loss_mask[b, t + 1])
            if tokens.segment_ids is not None:
                supervised &= bool(tokens.segment_ids[b, t] == tokens.segment_ids[b, t + 1])
            best = int(logits_BTV[b, t + 1].argmax())
            if supervised and (rows == "loss_mask" or best in selected):
                row = logits_BTV[b, t + 1].double()
                draft_probs = row[selected].exp() / row[selected].exp().sum()
                found[b * length + t] = (
                    draft_probs,
                    row.exp().sum().log(),
                    selected.index(best) if best in selected else -1,
                )
    return found


def test_shift_moves_left_and_fills_with_zero():
    assert shift_left(torch.tensor([[1, 2, 3], [4, 5, 6]])).tolist() == [[2, 3, 0], [5, 6, 0]]
    assert shift_left(torch.tensor([[True, True]])).tolist() == [[True, False]]
    assert shift_left(torch.tensor([[5]])).tolist() == [[0]]


def test_shifted_loss_mask_stops_at_the_end_of_a_packed_chat():
    mask = torch.ones(1, 5, dtype=torch.long)
    tokens = TokenBatch(
        input_ids=mask, attention_mask=mask, loss_mask=mask, segment_ids=torch.tensor([[0, 0, 0, 1, 1]])
    )
    assert shifted_loss_mask(tokens).tolist() == [[True, True, False, True, False]]


def test_mapping_of_a_hand_computed_case():
    mapping = VocabMapping.from_token_ids(torch.tensor([7, 2, 4]), 9)
    assert mapping.selected_token_ids.tolist() == [2, 4, 7]
    assert mapping.d2t.tolist() == [2, 3, 5]
    assert mapping.t2d.nonzero().flatten().tolist() == [2, 4, 7]
    assert mapping.draft_ids.tolist() == [-1, -1, 0, -1, 1, -1, -1, 2, -1]
    assert mapping.digest == VocabMapping.from_token_ids(torch.tensor([2, 4, 7]), 9).digest
    assert mapping.digest != VocabMapping.from_token_ids(torch.tensor([2, 4, 7]), 10).digest


def test_supervision_of_a_hand_computed_case():
    """Four target tokens, draft vocabulary {1, 3}; the target's output is written down, not computed."""
    logits = torch.tensor([[[9.0, 0, 0, 0], [0, 5, 0, 1], [0, 0, 7, 0], [0, 0, 1, 2]]])  # argmax 0, 1, 2, 3
    target = LinearTarget(1, 4)
    target.hidden = logits.new_zeros(1, 4, H)
    target.hidden[..., :4] = logits
    target.weight = torch.eye(V, H)
    ids = torch.tensor([[3, 1, 2, 3]])
    mask = torch.tensor([[0, 1, 1, 1]])
    selected = torch.tensor([1, 3])
    selected_mask = torch.zeros(V, dtype=torch.bool)
    selected_mask[selected] = True
    plain = compute_supervision(target, selected, selected_mask, ids, torch.ones_like(ids), mask)
    assert plain["input_ids"].tolist() == [[1, 2, 3, 0]]
    assert plain["loss_mask"].tolist() == [[1, 1, 1, 0]]
    # Rows are judged by the next position: argmax 1 is in, 2 is out, 3 is in; nothing follows the last row.
    assert plain["position_mask"].squeeze(-1).tolist() == [[True, False, True, False]]
    assert torch.allclose(plain["target_probs"][0, 0], torch.tensor([5.0, 1.0]).softmax(0))
    assert torch.allclose(plain["target_probs"][0, 2], torch.tensor([0.0, 2.0]).softmax(0))
    assert torch.equal(plain["aux_hidden_states"], target.aux)


@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
@pytest.mark.parametrize("rows", ["position_mask", "loss_mask"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_encoding_decodes_to_what_full_logits_give(encoding, rows, packed):
    target, tokens = LinearTarget(3, 16), tokens_of(packed=packed)
    _, batch = encoded_and_decoded(target, tokens, encoding, rows)
    expected = expected_rows(target, tokens, rows)
    assert batch.supervised_rows.tolist() == sorted(expected)
    assert len(expected) >= 3
    for index, row in enumerate(sorted(expected)):
        probs_K, log_normalizer, argmax = expected[row]
        assert torch.allclose(batch.targets.probs(slice(None))[index].double(), probs_K, atol=1e-6)
        assert torch.allclose(batch.target_probs.flatten(0, 1)[row].double(), probs_K, atol=1e-6)
        assert float(batch.log_normalizer[index]) == pytest.approx(float(log_normalizer), abs=1e-5)
        assert int(batch.argmax[index]) == argmax
        assert bool(batch.position_mask.flatten()[row]) == (argmax >= 0)
    unsent = [row for row in range(48) if row not in expected]
    assert not batch.target_probs.flatten(0, 1)[unsent].any()
    assert not batch.position_mask.flatten()[unsent].any()


def test_decoded_batch_equals_the_plain_form():
    target, tokens = LinearTarget(3, 16), tokens_of()
    plain = compute_supervision(
        target,
        MAPPING.selected_token_ids,
        MAPPING.t2d,
        tokens.input_ids,
        tokens.attention_mask,
        tokens.loss_mask,
    )
    _, batch = encoded_and_decoded(target, tokens, "probs")
    assert torch.equal(batch.position_mask, plain["position_mask"])
    assert torch.equal(batch.input_ids, plain["input_ids"])
    assert torch.equal(batch.loss_mask, plain["loss_mask"].bool())
    supervised = plain["position_mask"].squeeze(-1)
    assert torch.allclose(batch.target_probs[supervised], plain["target_probs"][supervised], atol=1e-6)
    real = tokens.attention_mask.bool()
    assert torch.equal(batch.aux_hidden_states[real], target.aux[real])
    assert not batch.aux_hidden_states[~real].any()


def test_a_target_that_returns_shifted_logits_gives_the_same():
    class Reference:
        def __init__(self, target):
            self.aux_hidden_states = target.aux
            self.logits = shift_left(target.hidden @ target.weight.T)

    target, tokens = LinearTarget(3, 16), tokens_of()
    vocab = DraftVocabOnDevice.of(MAPPING, torch.device("cpu"))
    ours, _ = encoded_and_decoded(target, tokens, "logits")
    theirs = encode_supervision(
        Reference(target), tokens, vocab, encoding="logits", rows="position_mask", chunk_rows=3
    )
    assert torch.equal(ours.supervised_rows, theirs.supervised_rows)
    assert torch.allclose(ours.values, theirs.values, atol=1e-5)
    with pytest.raises(InvalidRequest, match="use encoding logits"):
        encode_supervision(
            Reference(target), tokens, vocab, encoding="hidden", rows="position_mask", chunk_rows=3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encodings_agree_to_rounding_and_travel_in_the_targets_dtype(dtype):
    target, tokens = LinearTarget(3, 16, dtype), tokens_of()
    encoded, batches = zip(
        *(encoded_and_decoded(target, tokens, name) for name in ("probs", "logits", "hidden")), strict=True
    )
    assert [one.values.dtype for one in encoded] == [torch.float32, dtype, dtype]
    assert all(one.aux.dtype == dtype and one.log_normalizer.dtype == torch.float32 for one in encoded)
    for batch in batches[1:]:
        assert torch.equal(batch.supervised_rows, batches[0].supervised_rows)
        assert torch.equal(batch.argmax, batches[0].argmax)
        assert torch.equal(batch.log_normalizer, batches[0].log_normalizer)
        assert torch.allclose(
            batch.target_probs, batches[0].target_probs, atol=1e-5 if dtype == torch.float32 else 1e-2
        )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_batch_without_supervised_rows_is_valid(encoding):
    target, tokens = LinearTarget(3, 16), tokens_of()
    tokens.loss_mask = torch.zeros_like(tokens.loss_mask)
    encoded, batch = encoded_and_decoded(target, tokens, encoding)
    assert encoded.supervised_rows.shape == (0,)
    assert batch.targets.logits(slice(None)).shape == (0, K)
    assert not batch.position_mask.any()
    assert batch.target_probs.shape == (3, 16, K)


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_chunking_never_holds_more_logits_than_asked_and_changes_no_row(chunk_rows):
    target, tokens = LinearTarget(3, 16), tokens_of()
    output = target.generate_batch(None, None, None)
    sizes = []

    def project(hidden_NH):
        sizes.append(len(hidden_NH))
        return hidden_NH @ target.weight.T

    output.project = project
    vocab = DraftVocabOnDevice.of(MAPPING, torch.device("cpu"))
    encoded = encode_supervision(
        output, tokens, vocab, encoding="probs", rows="loss_mask", chunk_rows=chunk_rows
    )
    assert max(sizes) <= chunk_rows
    assert sum(sizes) == int(shifted_loss_mask(tokens).sum()) == len(encoded.supervised_rows)
    whole, _ = encoded_and_decoded(target, tokens, "probs", "loss_mask", chunk_rows=1000)
    assert torch.allclose(encoded.values, whole.values, atol=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_logits_of_one_chunk_are_gone_when_the_next_come(encoding):
    target, tokens = LinearTarget(3, 16), tokens_of()
    output, chunks = target.generate_batch(None, None, None), []

    def project(hidden_NH):
        assert all(logits() is None for logits in chunks)
        logits = hidden_NH @ target.weight.T
        chunks.append(weakref.ref(logits))
        return logits

    output.project = project
    vocab = DraftVocabOnDevice.of(MAPPING, torch.device("cpu"))
    encode_supervision(output, tokens, vocab, encoding=encoding, rows="position_mask", chunk_rows=4)
    assert len(chunks) > 2


@pytest.mark.parametrize("num_aux_layers", [1, 3, 5])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_wire_bytes_are_what_bytes_per_token_claims(encoding, num_aux_layers):
    target, tokens = LinearTarget(3, 16, torch.bfloat16, num_aux_layers=num_aux_layers), tokens_of()
    encoded, batch = encoded_and_decoded(target, tokens, encoding)
    real = int(tokens.attention_mask.sum())
    share = len(batch.supervised_rows) / real
    claimed = ENCODINGS[encoding].bytes_per_token(
        hidden_size=H,
        draft_vocab_size=K,
        dtype_bytes=2,
        supervised_share=share,
        num_aux_layers=num_aux_layers,
    )
    assert encoded.num_bytes == pytest.approx(claimed * real)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_tensor_of_a_reply_is_alone_in_its_storage(encoding):
    target, tokens = LinearTarget(3, 16), tokens_of(lengths=(16, 16, 16))
    encoded, _ = encoded_and_decoded(target, tokens, encoding, rows="loss_mask", chunk_rows=1000)
    sent = []
    encoded.map_tensors(sent.append)
    assert len(sent) == (7 if ENCODINGS[encoding].fp8_states else 5)
    for tensor in sent:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    held = {t.untyped_storage().data_ptr() for t in (target.aux, target.hidden, target.weight)}
    assert not held & {t.untyped_storage().data_ptr() for t in sent}


def test_head_with_bias_scale_and_soft_cap_follows_its_formula():
    head = DraftHead(weight=torch.randn(5, H), bias=torch.randn(5), scale=0.5, soft_cap=3.0)
    hidden = torch.randn(4, H) * 10
    expected = 3.0 * torch.tanh((hidden @ head.weight.T + head.bias) * 0.5 / 3.0)
    assert torch.allclose(head.project(hidden), expected, atol=1e-5)
