import pytest
import torch
from support.supervised_batches import assert_same_supervision, colocated, served, supervision_of
from torch import nn

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import InvalidRequest, UnsupportedTarget
from eagle_rpc.supervision import (
    ENCODINGS,
    SessionSettings,
    TokenBatch,
    VocabMapping,
)
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

MAPPING = VocabMapping.from_token_ids(torch.arange(0, 97, 3), 97)
CONFIG = TargetConfig(model="tiny", chunk_rows=5)


def tokens_of(seed=0, packed=False):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(11)[None] < torch.tensor([[11], [6], [9]])
    return TokenBatch(
        input_ids=torch.randint(3, 97, (3, 11), generator=generator),
        attention_mask=mask.long(),
        loss_mask=(mask & (torch.rand(3, 11, generator=generator) < 0.8)).long(),
        segment_ids=(torch.arange(11)[None] >= 4).long().repeat(3, 1) if packed else None,
    )


def backend(model, encoding="hidden", rows="loss_mask", mapping=MAPPING):
    return colocated(HFEagle3TargetModel(model), CONFIG, mapping, encoding, rows)


def assert_bitwise(left, right):
    assert_same_supervision(left, right)
    assert torch.equal(left.targets.logits(slice(2, 5)), right.targets.logits(slice(2, 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("packed", [False, True])
def test_colocated_and_served_supervision_are_the_same_bits(any_model, dtype, encoding, packed):
    any_model.to(dtype)
    tokens = tokens_of(packed=packed)
    by_server = served(HFEagle3TargetModel(any_model), CONFIG, MAPPING, encoding, tokens)
    here = supervision_of(backend(any_model, encoding), tokens)
    assert len(here.supervised_rows) > 10
    assert_bitwise(here, by_server)


def test_a_stream_gives_every_batch_in_order(make_model):
    colocated = backend(make_model("llama"))
    batches = [tokens_of(0), tokens_of(1, packed=True), tokens_of(2)]
    for tokens, streamed in zip(batches, colocated.stream(batches), strict=True):
        assert_bitwise(streamed, supervision_of(colocated, tokens))
    assert colocated.totals.seconds_waited > 0


def test_a_draft_can_be_trained_on_colocated_supervision(make_model):
    batch = supervision_of(backend(make_model("llama"), rows="position_mask"), tokens_of())
    fc = nn.Linear(96, len(MAPPING))
    logits = fc(batch.aux_hidden_states.flatten(0, 1)[batch.supervised_rows])
    loss = (
        -(batch.targets.probs(slice(None)) * logits.log_softmax(-1)).sum()
        + (batch.log_normalizer * logits.sum(-1)).sum() * 0
    )
    loss.backward()
    assert fc.weight.grad.abs().sum() > 0


def test_the_embedding_and_info_are_the_models(make_model):
    model = make_model("llama")
    colocated = backend(model)
    assert torch.equal(colocated.input_embeddings(), model.get_input_embeddings().weight)
    assert colocated.model_info().max_batch_tokens == CONFIG.max_batch_tokens


def test_refusals_are_those_of_the_service(make_model):
    model = make_model("llama")
    with pytest.raises(InvalidRequest, match="open_session must come before"):
        supervision_of(
            ColocatedEagle3TargetModel(
                HFEagle3TargetModel(model), CONFIG, SessionSettings(encoding="probs", rows="loss_mask")
            ),
            tokens_of(),
        )
    with pytest.raises(InvalidRequest, match="encoding must be one of"):
        backend(model, encoding="zip")
    with pytest.raises(InvalidRequest, match="must be made for 97 target tokens, got one for 50"):
        backend(model, mapping=VocabMapping.from_token_ids(torch.arange(5), 50))
    bad = tokens_of()
    bad.input_ids[0, 0] = 97
    with pytest.raises(InvalidRequest, match="input_ids must lie in"):
        supervision_of(backend(model), bad)
    closed = backend(model)
    closed.close()
    with pytest.raises(InvalidRequest, match="open_session"):
        supervision_of(closed, tokens_of())
    model.config.logits_scaling = 4.0
    with pytest.raises(UnsupportedTarget, match="encoding=logits"):
        backend(model)
