import pytest
import torch
from server_calls import SELECTED, WAIT, ask, config, error_of, open_session, send, tokens_of, try_to_open
from torch import nn

from eagle_rpc.errors import ConfigError, EagleRpcError
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import (
    GenerateRequest,
    HeartbeatReply,
    OpenedSession,
    TargetExpectation,
    TokenBatch,
    VocabMapping,
    decode_supervision,
    own_storage,
    shift_left,
)
from eagle_rpc.target.model import HFEagle3TargetModel


@pytest.fixture
def server(serve, model):
    return serve(HFEagle3TargetModel(model))


def test_model_info_has_the_limits_of_the_configuration(model, serve):
    target = HFEagle3TargetModel(model)
    whole, narrow = serve(target).model_info(), serve(target, max_length=16).model_info()
    assert (whole.max_length, whole.max_batch_tokens, narrow.max_length) == (64, 100, 16)
    assert whole.weights_fingerprint == narrow.weights_fingerprint
    assert whole.incarnation != narrow.incarnation
    with pytest.raises(
        ConfigError, match=r"target.max_length must be at most the model's context 64, got 65"
    ):
        TargetModelServer(target, config(max_length=65))


def test_embeddings_are_the_models_and_stand_alone_in_their_storage(server, model):
    embedding = server.input_embeddings()
    assert torch.equal(embedding, model.get_input_embeddings().weight)
    head = server.output_embeddings(open_session(server))
    assert torch.equal(head.weight, model.lm_head.weight[SELECTED.sort().values])
    for tensor in (embedding, head.weight):
        assert not tensor.requires_grad
        assert not isinstance(tensor, nn.Parameter)
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_view_of_a_larger_storage_is_copied_and_a_whole_one_is_not():
    whole = torch.randn(4, 6)
    for view in (whole[:3], whole[:, :2], whole.T):
        alone = own_storage(view)
        assert torch.equal(alone, view)
        assert alone.is_contiguous()
        assert alone.untyped_storage().nbytes() == view.numel() * 4
    assert own_storage(whole).data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
def test_supervision_is_that_of_full_logits(server, model, encoding, packed):
    session, tokens = open_session(server, encoding=encoding, rows="loss_mask"), tokens_of(packed=packed)
    batch = decode_supervision(ask(server, session, tokens), tokens, server.output_embeddings(session))
    assert len(batch.supervised_rows) > 5
    for row, probs_K, log_normalizer, argmax in zip(
        batch.supervised_rows.tolist(),
        batch.targets.probs(slice(None)),
        batch.log_normalizer,
        batch.argmax.tolist(),
        strict=True,
    ):
        sequence, judge = row // 9, row % 9 + 1
        first = 3 if packed and judge >= 3 else 0
        with torch.no_grad():
            logits_V = model(tokens.input_ids[sequence : sequence + 1, first : judge + 1]).logits[0, -1]
        ascending = SELECTED.sort().values
        assert torch.allclose(probs_K, logits_V[ascending].softmax(0), atol=1e-4)
        assert torch.allclose(log_normalizer, logits_V.logsumexp(0), atol=1e-4)
        assert argmax == (
            ascending.tolist().index(int(logits_V.argmax())) if int(logits_V.argmax()) in SELECTED else -1
        )


def test_two_sessions_keep_their_own_mappings_and_settings(server):
    tokens = tokens_of()
    first = open_session(server, encoding="logits", rows="loss_mask")
    second = open_session(
        server, encoding="probs", rows="loss_mask", selected_token_ids=torch.tensor([8, 9, 10])
    )
    replies = [ask(server, session, tokens) for session in (first, second, first)]
    assert [reply.values.shape[1] for reply in replies] == [8, 3, 8]
    assert [reply.encoding for reply in replies] == ["logits", "probs", "logits"]
    assert torch.equal(replies[0].values, replies[2].values)
    assert not torch.equal(replies[0].argmax, replies[1].argmax)


def test_sessions_end_by_themselves_and_leave_the_others(server):
    first, second = open_session(server), open_session(server)
    assert first != second
    server.disconnect(first)
    assert error_of(send, server, first).code == "unknown_session"
    assert error_of(server.disconnect, first).code == "unknown_session"
    assert ask(server, second)


def test_a_session_is_told_its_credits_and_its_lease(serve, model):
    server = serve(HFEagle3TargetModel(model), max_queued_per_session=7, session_lease=9.0)
    opened = try_to_open(server)
    assert opened == OpenedSession(id=opened.id, credits=7, lease=9.0)


def test_set_vocab_mapping_opens_a_session_with_defaults(server):
    assert ask(server, server.set_vocab_mapping(SELECTED).result(WAIT).id).encoding == "hidden"
    assert error_of(server.set_vocab_mapping, "all").code == "invalid_request"


def test_heartbeat_answers_with_the_incarnation_and_whether_the_target_drains(server):
    session, incarnation = open_session(server), server.model_info().incarnation
    assert server.heartbeat(session) == HeartbeatReply(incarnation=incarnation, draining=False)
    assert error_of(server.heartbeat, "nobody").code == "unknown_session"
    assert server.drain(WAIT)
    assert server.heartbeat(session) == HeartbeatReply(incarnation=incarnation, draining=True)


def test_a_request_for_another_incarnation_is_refused_with_both(server):
    request = GenerateRequest(
        session="x", incarnation="old", request_id="r", tokens=tokens_of(), seconds_left=WAIT
    )
    refused = error_of(server.generate, request)
    assert refused.code == "stale_incarnation"
    assert str(refused) == f"the request is for incarnation old, this is {server.model_info().incarnation}"


def test_too_many_sessions_are_busy(serve, model):
    server = serve(HFEagle3TargetModel(model), max_sessions=1)
    session = open_session(server)
    refused = error_of(try_to_open, server)
    assert (refused.code, refused.retry_after) == ("busy", 1.0)
    server.disconnect(session)
    open_session(server)


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"encoding": "zip"}, "invalid_request", "encoding must be one of"),
        ({"encoding": ["probs"]}, "invalid_request", "encoding must be a str, got list"),
        ({"rows": None}, "invalid_request", "rows must be a str, got NoneType"),
        ({"run": 3}, "invalid_request", "run must be a str, got int"),
        ({"run": "x" * 129}, "invalid_request", "run must be at most 128 printable characters"),
        ({"trainer": "two\nlines"}, "invalid_request", "trainer must be at most 128 printable characters"),
        ({"expected": None}, "invalid_request", "expected must be a TargetExpectation"),
        (
            {"expected": TargetExpectation(hidden_size=5)},
            "target_mismatch",
            "hidden_size must be 5, the target has 32",
        ),
        ({"selected_token_ids": None}, "invalid_request", "selected_token_ids must be a tensor"),
        ({"selected_token_ids": torch.tensor([1, 1])}, "invalid_request", "must be distinct"),
        ({"selected_token_ids": torch.tensor([1, 97])}, "invalid_request", r"must lie in [0, 97)"),
        ({"selected_token_ids": torch.arange(98)}, "invalid_request", "must hold 1 to 97 ids, got 98"),
    ],
)
def test_a_bad_session_is_refused_and_leaves_nothing(server, fields, code, message):
    error = error_of(try_to_open, server, **fields)
    assert error.code == code
    assert message in str(error)
    assert server.status()["sessions"] == []


def bad_requests():
    ids = torch.full((1, 4), 97)
    ones = torch.ones_like(ids)
    unset = TokenBatch.__new__(TokenBatch)
    return {
        "no request": None,
        "session of another type": {"session": ["x"]},
        "unknown session": {"session": "x"},
        "incarnation of another type": {"incarnation": None},
        "request id": {"request_id": 3},
        "request id without end": {"request_id": "x" * 1000},
        "tokens of another type": {"tokens": {"input_ids": ids}},
        "tokens never set": {"tokens": unset},
        "no tensors": {"tokens": TokenBatch(input_ids=None, attention_mask=None, loss_mask=None)},
        "no seconds": {"seconds_left": None},
        "seconds gone": {"seconds_left": 0.0},
        "seconds not a number": {"seconds_left": float("nan")},
        "endless": {"seconds_left": float("inf")},
        "id out of range": {"tokens": TokenBatch(input_ids=ids, attention_mask=ones, loss_mask=ones)},
        "too long": {"tokens": tokens_of(1, 65)},
        "too many": {"tokens": tokens_of(12, 9)},
    }


@pytest.mark.parametrize("case", bad_requests())
def test_a_bad_request_is_refused_and_the_server_lives(server, case):
    session, request = open_session(server), bad_requests()[case]
    if isinstance(request, dict):
        good = {"session": session, "incarnation": server.model_info().incarnation, "request_id": "r"}
        request = GenerateRequest(**{**good, "tokens": tokens_of(), "seconds_left": WAIT, **request})
    with pytest.raises((EagleRpcError, AttributeError)) as raised:
        server.generate(request)
    code = "unknown_session" if "session" in case else "invalid_request"
    assert case == "tokens never set" or raised.value.code == code
    assert ask(server, session)


@pytest.mark.parametrize("junk", [None, "r", [3], {"r": 1}, torch.ones(2)])
def test_only_a_list_of_ids_is_cancelled(server, junk):
    assert error_of(server.cancel, open_session(server), junk).code == "invalid_request"


class ReferenceTarget:
    """A foreign target with two methods that returns logits, already shifted."""

    def __init__(self):
        torch.manual_seed(0)
        self._embedding = nn.Embedding(97, 16)
        self._head = nn.Linear(16, 97)

    def get_input_embeddings(self):
        return self._embedding

    def generate_batch(self, input_ids, attention_mask, loss_mask):
        hidden = self._embedding(input_ids)

        class Output:
            aux_hidden_states = torch.cat([hidden] * 3, dim=-1)
            logits = shift_left(self._head(hidden))

        return Output()


def test_a_duck_typed_target_serves_logits_and_is_described_by_its_embedding(serve):
    server = serve(ReferenceTarget())
    info = server.model_info()
    assert (info.architecture, info.vocab_size, info.hidden_size, info.dtype) == (
        "ReferenceTarget",
        97,
        16,
        "float32",
    )
    reply = ask(server, open_session(server, encoding="logits", rows="loss_mask"))
    assert reply.values.shape[1] == len(SELECTED)
    assert not reply.values.requires_grad
    session = open_session(server, encoding="probs")
    for refused in (error_of(try_to_open, server), error_of(server.output_embeddings, session)):
        assert refused.code == "unsupported_target"
        assert "use supervision.encoding=logits" in str(refused)


def test_a_head_that_cannot_be_rebuilt_refuses_hidden_and_serves_logits(serve, model):
    model.config.logits_scaling = 4.0  # Granite's field, which Llama's forward does not read
    server = serve(HFEagle3TargetModel(model))
    refused = error_of(try_to_open, server)
    assert refused.code == "unsupported_target"
    assert "use supervision.encoding=logits" in str(refused)
    assert ask(server, open_session(server, encoding="logits"))


def test_mapping_order_does_not_matter(server):
    tokens = tokens_of()
    replies = [
        ask(server, open_session(server, encoding="logits", selected_token_ids=ids), tokens)
        for ids in (SELECTED, VocabMapping.from_token_ids(SELECTED, 97).selected_token_ids)
    ]
    assert torch.equal(replies[0].values, replies[1].values)
