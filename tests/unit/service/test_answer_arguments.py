"""Requests for answers with arguments that no honest sender has."""

import dataclasses
import math

import torch
from answer_calls import prompt, prompt_request, said
from server_calls import WAIT, error_of, open_session

from eagle_rpc.errors import InvalidRequest, StaleIncarnation, UnknownSession
from eagle_rpc.supervision import PromptAnswer

HOSTILE = {
    "max_length": [0, 1, 65, 2**70, True, None, "40", 8.0],
    "max_new_tokens": [0, -1, 40, True, None, 8.0],
    "top_k": [-1, 98, True, None],
    "seed": [2**63, 1.0, None],
    "temperature": [-0.1, math.inf, math.nan, "1", None, True],
    "top_p": [0, -1, 1.1, math.nan, None],
    "stop_token_ids": [[2], None, (97,), (-1,), (2.0,), ((2,),), (True,), tuple(range(65))],
}
NO_PROMPTS = [
    torch.zeros(0, dtype=torch.int64),
    torch.zeros(33, dtype=torch.int64),
    torch.zeros(1, 3, dtype=torch.int64),
    torch.zeros((), dtype=torch.int64),
    torch.tensor([1.0]),
    torch.tensor([-1]),
    torch.tensor([97]),
    torch.eye(3, dtype=torch.int64).to_sparse(),
    torch.zeros(3, dtype=torch.int64, device="meta"),
    [5, 6],
    None,
]


def test_settings_that_break_their_rule_are_refused_by_name(serve_answers, answering):
    server = serve_answers(answering)
    session = open_session(server, encoding="logits")
    for name, value in [(name, value) for name, values in HOSTILE.items() for value in values]:
        error = error_of(prompt, server, session, **{name: value})
        assert isinstance(error, InvalidRequest) and str(error).startswith(name), (name, value, error)


def test_prompts_that_are_no_ids_of_the_target_are_refused(serve_answers, answering):
    server = serve_answers(answering)
    request = prompt_request(server, open_session(server, encoding="logits"))
    for ids in NO_PROMPTS:
        request.prompt = dataclasses.replace(request.prompt, token_ids=ids)
        error = error_of(server.answer, request)
        assert isinstance(error, InvalidRequest) and str(error).startswith("token_ids"), (ids, error)


def test_requests_of_other_shapes_are_refused_and_counted(serve_answers, answering):
    server = serve_answers(answering)
    session = open_session(server, encoding="logits")
    good = prompt_request(server, session)
    changed = [
        ({"request_id": "x" * 200}, InvalidRequest),
        ({"incarnation": "another"}, StaleIncarnation),
        ({"incarnation": 7}, InvalidRequest),
        ({"session": "nobody"}, UnknownSession),
        ({"session": ["nobody"]}, UnknownSession),
        ({"prompt": [1, 2]}, InvalidRequest),
        ({"prompt": dataclasses.replace(good.prompt, key="two\nlines")}, InvalidRequest),
        ({"prompt": dataclasses.replace(good.prompt, settings={})}, InvalidRequest),
        ({"seconds_left": -1}, InvalidRequest),
    ]
    for fields, error in changed:
        assert isinstance(error_of(server.answer, dataclasses.replace(good, **fields)), error), fields
    for value in (None, 7, "request", good.prompt):
        assert isinstance(error_of(server.answer, value), InvalidRequest)
    assert sum(server.throughput.requests.values()) == len(changed) + 4
    assert isinstance(server.answer(good).result(WAIT), PromptAnswer)


def test_the_stored_prompt_is_no_view_of_a_larger_message(serve_answers, answering):
    server = serve_answers(answering, max_answers=1)
    session = open_session(server, encoding="logits")
    answering.opened.clear()
    large = torch.full((10_000,), 5)
    request = prompt_request(server, session)
    request.prompt = dataclasses.replace(request.prompt, token_ids=large[:3])
    answer = server.answer(request)
    assert answering.started.wait(WAIT)
    (work,) = server._answers._running.values()
    assert work.request.token_ids.untyped_storage().nbytes() == 3 * 8
    answering.opened.set()
    assert said(answer) == [5, 5, 5]
