"""Foreign targets: two methods are enough, and whatever else they have is used."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.supervision import (
    DraftHead,
    DraftVocabOnDevice,
    TokenBatch,
    VocabMapping,
    as_target,
    check_encoding,
    describe_target,
    run_target,
    shift_left,
    supervise,
)

V, H = 12, 4
LIMITS = {"max_length": None, "max_batch_tokens": 50, "chunk_rows": 5}


class Plain:
    """The reference's duck type."""

    def __init__(self):
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(V, H), nn.Linear(H, V)

    def get_input_embeddings(self):
        return self.embedding

    def generate_batch(self, input_ids, attention_mask, loss_mask):
        hidden = self.embedding(input_ids)
        return SimpleNamespace(
            aux_hidden_states=torch.cat([hidden] * 3, dim=-1), logits=shift_left(self.head(hidden))
        )


class WithHead(Plain):
    takes_host_tokens = True

    def __init__(self):
        super().__init__()
        self.probed, self.packing = [], []

    def generate_batch(self, input_ids, attention_mask, loss_mask, **packing):
        self.packing.append(packing)
        return super().generate_batch(input_ids, attention_mask, loss_mask)

    def draft_head(self, selected_token_ids):
        return DraftHead(weight=self.head.weight[selected_token_ids])

    def probe_head(self, selected_token_ids):
        self.probed.append(selected_token_ids)


def tokens_of(segment_ids=None):
    ids = torch.arange(10).view(2, 5)
    ones = torch.ones_like(ids)
    return TokenBatch(input_ids=ids, attention_mask=ones, loss_mask=ones, segment_ids=segment_ids)


def test_two_methods_are_enough_to_be_supervised_by_logits():
    target, tokens = as_target(Plain()), tokens_of()
    mapping = VocabMapping.from_token_ids(torch.tensor([1, 3, 5]), V)
    vocab = DraftVocabOnDevice.of(mapping, torch.device("cpu"))
    encoded = supervise(target, tokens, vocab, encoding="logits", rows="loss_mask", chunk_rows=3)
    expected = run_target(target, tokens).logits[:, :-1, [1, 3, 5]].flatten(0, 1)
    assert torch.equal(encoded.values, expected)
    check_encoding(target, mapping.selected_token_ids, "logits")
    with pytest.raises(UnsupportedTarget, match=r"target Plain gives no rows of its head.*encoding=logits"):
        check_encoding(target, mapping.selected_token_ids, "hidden")


def test_members_that_a_target_has_take_the_place_of_defaults():
    plain, ids = WithHead(), torch.tensor([1, 3])
    target = as_target(plain)
    check_encoding(target, ids, "hidden")
    assert target.takes_host_tokens and len(plain.probed) == 1
    assert torch.equal(target.draft_head(ids).weight, plain.head.weight[ids])


def test_a_target_with_all_members_is_used_as_it_is():
    class Whole(WithHead):
        devices = (torch.device("cpu"),)

        def model_info(self):
            raise NotImplementedError

    whole = Whole()
    assert as_target(whole) is whole


def test_segments_are_passed_for_packed_batches_only():
    plain, segments = WithHead(), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    run_target(as_target(plain), tokens_of())
    run_target(as_target(plain), tokens_of(segments))
    assert plain.packing == [{}, {"segment_ids": segments}]


def test_a_plain_target_is_described_by_its_embedding_and_the_configured_limits():
    info = describe_target(as_target(Plain()), **LIMITS, incarnation="one")
    assert (info.architecture, info.vocab_size, info.hidden_size, info.dtype) == ("Plain", V, H, "float32")
    assert (info.max_length, info.max_batch_tokens, info.incarnation) == (50, 50, "one")
    assert info.form == "5 rows a projection"
    assert describe_target(as_target(Plain()), **{**LIMITS, "max_length": 7}).max_length == 7


def test_a_length_beyond_the_models_context_is_refused():
    target = as_target(Plain())
    info = describe_target(target, **LIMITS)
    target.model_info = lambda: info
    with pytest.raises(ConfigError, match=r"target\.max_length must be at most .* 50, got 51"):
        describe_target(target, **{**LIMITS, "max_length": 51})
