"""The registry of encodings, and what a newcomer to it gets without further changes."""

import pytest
import torch

from eagle_rpc.config import choices
from eagle_rpc.supervision import (
    ENCODINGS,
    DraftHead,
    DraftVocabOnDevice,
    LogitEncoding,
    SessionSettings,
    TargetOutput,
    TokenBatch,
    VocabMapping,
    decode_supervision,
    encode_supervision,
)


def test_the_configuration_names_every_encoding():
    assert {choice.value for choice in choices.Encoding} == set(ENCODINGS)
    assert all(encoding.name == name for name, encoding in ENCODINGS.items())


def test_the_default_encoding_is_exact():
    assert ENCODINGS[SessionSettings().encoding].exact


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoding_sends_either_hidden_states_or_values_of_logits(name):
    encoding, logits = ENCODINGS[name], torch.randn(3, 5)
    if encoding.needs_head:
        head = DraftHead(weight=torch.randn(5, 4))
        assert encoding(torch.randn(3, 4), head).logits(slice(None)).shape == (3, 5)
    else:
        assert issubclass(encoding, LogitEncoding)
        assert torch.allclose(encoding(encoding.encode(logits)).probs(slice(None)), logits.softmax(-1))


class HalfLogits(LogitEncoding):
    name = "half_logits"
    exact = False

    @staticmethod
    def value_bytes(hidden_size, draft_vocab_size, dtype_bytes):
        return 2 * draft_vocab_size

    @staticmethod
    def encode(logits_NK):
        return logits_NK.half()

    def logits(self, rows):
        return self.values[rows].float()


def test_a_new_class_in_the_registry_is_all_that_an_encoding_takes(monkeypatch):
    monkeypatch.setitem(ENCODINGS, "half_logits", HalfLogits)
    SessionSettings(encoding="half_logits").check()
    ids = torch.arange(8)[None]
    ones = torch.ones_like(ids)
    tokens = TokenBatch(input_ids=ids, attention_mask=ones, loss_mask=ones)
    output = TargetOutput(
        aux_hidden_states=torch.randn(1, 8, 12), last_hidden_state=torch.randn(1, 8, 16), project=lambda x: x
    )
    vocab = DraftVocabOnDevice.of(VocabMapping.from_token_ids(torch.arange(6), 16), torch.device("cpu"))
    form = {"rows": "loss_mask", "chunk_rows": 3}
    half, whole = (
        encode_supervision(output, tokens, vocab, encoding=name, **form) for name in ("half_logits", "logits")
    )
    assert half.values.dtype == torch.float16
    found = decode_supervision(half, tokens, None).targets.logits(slice(None))
    assert torch.equal(found, whole.values.half().float())
    claimed = ENCODINGS["half_logits"].bytes_per_token(
        hidden_size=4, draft_vocab_size=6, dtype_bytes=4, supervised_share=7 / 8
    )
    assert half.num_bytes == claimed * 8
