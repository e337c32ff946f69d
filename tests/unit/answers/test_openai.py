"""Answers of OpenAI-compatible servers, which a small server in this process stands for."""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_tokenizer import VOCAB_SIZE, make_tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("openai", reason="the extra openai is not installed")

from support.completion_server import CompletionServer

from eagle_rpc.answers import endpoint
from eagle_rpc.answers import openai as backend
from eagle_rpc.answers.answerer import Answer
from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.answers.openai import endpoint_answerer
from eagle_rpc.config import Config
from eagle_rpc.config.checks import check
from eagle_rpc.config.choices import AnswerBackend, JobName
from eagle_rpc.data import ChatTemplate
from eagle_rpc.errors import ConfigError, TargetUnavailable

# Many tokens end an answer, so that about half of the answers end before their limit.
STOP_IDS = frozenset([2, *range(0, VOCAB_SIZE, 14)])
NEW_TOKENS = 12
PROMPTS = {str(length): list(range(3, 3 + length)) for length in range(4, 16)}
TOKENIZER = make_tiny_tokenizer()
PROBE = TOKENIZER.encode("The capital of France is", add_special_tokens=False)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def servers(model: LlamaForCausalLM) -> Iterator[list[CompletionServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(CompletionServer(model, TOKENIZER, STOP_IDS)) for _ in range(2)]


@pytest.fixture
def server(servers: list[CompletionServer]) -> CompletionServer:
    return servers[0]


@pytest.fixture
def config(server: CompletionServer, tmp_path: Path) -> Config:
    config = Config()
    config.run.name, config.target.model = "test", "models/tiny"
    settings = config.regenerate
    settings.backend, settings.endpoints = AnswerBackend.openai, [server.url]
    settings.max_new_tokens, settings.concurrency = NEW_TOKENS, 3
    return config


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_REST_SECONDS", 0.0)


def asked(config: Config, prompts: dict[str, list[int]] | None = None) -> dict[str, Answer]:
    template = ChatTemplate(TOKENIZER, stop_token_ids=STOP_IDS)
    with endpoint_answerer(config, template, context=256) as answerer:
        for key, prompt in (PROMPTS if prompts is None else prompts).items():
            answerer.submit(key, prompt)
        answers = list(answerer.answers())
    assert len({answer.key for answer in answers}) == len(answers)
    return {answer.key: answer for answer in answers}


def by_engine(model: LlamaForCausalLM, prompts: dict[str, list[int]], **changes: Any) -> dict[str, Answer]:
    settings = {"max_new_tokens": NEW_TOKENS, "tokenizer": TOKENIZER, **changes}
    engine = AnswerEngine(model, batch_size=4, stop_token_ids=STOP_IDS, **settings)
    for key, prompt in prompts.items():
        engine.submit(key, prompt)
    return {answer.key: answer for answer in engine.answers()}


def test_greedy_answers_have_the_ids_of_the_own_engine(config: Config, model: LlamaForCausalLM):
    found = asked(config)

    assert found == by_engine(model, PROMPTS)
    assert {answer.truncated for answer in found.values()} == {True, False}


def test_stop_texts_end_answers_where_they_end_those_of_the_own_engine(
    config: Config, model: LlamaForCausalLM
):
    # The text stands in the answer to the probe, which must not be cut.
    (probe,) = by_engine(model, {"probe": PROBE}, max_new_tokens=8).values()
    stop = next(one for one in TOKENIZER.decode(probe.token_ids) if one.isascii() and one.isprintable())
    config.regenerate.stop = [stop]
    prompts = {**PROMPTS, "probe": PROBE}

    found = asked(config, prompts)

    assert found == by_engine(model, prompts, stop_texts=[stop])
    assert found["probe"].stop_token is None and not found["probe"].truncated


def test_requests_state_every_setting_that_the_model_could_bring_its_own_default_for(
    config: Config, server: CompletionServer
):
    asked(config, {"a": [5, 6]})

    (body,) = server.bodies
    assert body["prompt"] == [5, 6] and body["model"] == "tiny" and body["max_tokens"] == NEW_TOKENS
    assert body["temperature"] == 0 and body["top_p"] == 1 and body["top_k"] == -1 and body["min_p"] == 0
    assert body["repetition_penalty"] == 1 and body["presence_penalty"] == body["frequency_penalty"] == 0
    assert set(body["stop_token_ids"]) == STOP_IDS
    assert "seed" not in body and "stop" not in body


def test_sampling_depends_on_seed_and_key_alone(config: Config, server: CompletionServer):
    config.regenerate.temperature, config.regenerate.top_p, config.regenerate.top_k = 0.7, 0.9, 40
    config.regenerate.stop = ["END"]
    for order in ("abc", "cba"):
        asked(config, {key: [ord(key)] for key in order})

    assert all(body["temperature"] == 0.7 and body["top_p"] == 0.9 for body in server.bodies)
    assert all(body["top_k"] == 40 and body["stop"] == ["END"] for body in server.bodies)
    assert len({(body["prompt"][0], body["seed"]) for body in server.bodies}) == 3
    assert len({body["seed"] for body in server.bodies}) == 3


def test_all_endpoints_work_at_a_time_and_none_has_more_requests_than_allowed(
    config: Config, servers: list[CompletionServer]
):
    config.regenerate.endpoints = [server.url for server in servers]
    # No request ends before all that are allowed are under way at both.
    together = threading.Barrier(2 * config.regenerate.concurrency)
    for server in servers:
        server.together = together

    assert asked(config).keys() == PROMPTS.keys()

    assert [server.most_at_a_time for server in servers] == [config.regenerate.concurrency] * 2


def test_a_prompt_may_be_submitted_while_answers_come(config: Config):
    template = ChatTemplate(TOKENIZER, stop_token_ids=STOP_IDS)
    with endpoint_answerer(config, template, context=256) as answerer:
        answerer.submit("first", [5, 6, 7])
        keys = []
        for answer in answerer.answers():
            keys.append(answer.key)
            if answer.key == "first":
                answerer.submit("second", [5, 6, 7, *answer.said_ids])
        assert keys == ["first", "second"]
        assert answerer.num_generated > 1


def test_leaving_early_ends_the_requests_under_way(config: Config):
    template = ChatTemplate(TOKENIZER, stop_token_ids=STOP_IDS)
    with endpoint_answerer(config, template, context=256) as answerer:
        for key, prompt in PROMPTS.items():
            answerer.submit(key, prompt)
        assert next(answerer.answers()).key in PROMPTS


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_cannot_answer_for_a_while_loses_no_prompt(
    config: Config, server: CompletionServer, status: int
):
    # The client itself sends a request three times.
    server.statuses.extend([status] * 12)

    found = asked(config)

    assert found.keys() == PROMPTS.keys() and not any(answer.refusal for answer in found.values())
    assert not server.statuses


def test_the_prompts_of_a_lost_endpoint_go_to_the_others(
    config: Config, servers: list[CompletionServer], caplog: pytest.LogCaptureFixture
):
    config.regenerate.endpoints = [server.url for server in servers]
    config.rpc.reconnect_deadline = 0.001
    servers[1].statuses.extend([503] * 1000)

    found = asked(config)

    assert found.keys() == PROMPTS.keys() and not any(answer.refusal for answer in found.values())
    assert "1 other endpoints go on" in caplog.text


def test_the_job_ends_once_no_endpoint_is_left(config: Config, servers: list[CompletionServer]):
    config.regenerate.endpoints = [server.url for server in servers]
    config.rpc.reconnect_deadline = 0.001
    for server in servers:
        server.statuses.extend([503] * 1000)

    with pytest.raises(
        TargetUnavailable, match=r"no endpoint .* is left: gave up .*/v1 answers 503: made to"
    ):
        asked(config)


@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_a_prompt_that_the_server_refuses_is_a_refusal_in_words(
    config: Config, server: CompletionServer, status: int
):
    server.status_for[4] = status

    found = asked(config)

    assert found.keys() == PROMPTS.keys()
    refusals = {key: answer.refusal for key, answer in found.items() if answer.refusal}
    assert refusals == {"4": f"{server.url} answers {status}: made to answer {status}"}
    assert found["4"].said_ids == [] and not found["4"].truncated


def test_a_prompt_without_an_answer_in_time_is_a_refusal(
    config: Config, server: CompletionServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(endpoint, "_RETRIES", 0)
    config.regenerate.answer_timeout = 5
    server.held_prompt = PROMPTS["4"]

    found = asked(config)

    refusals = {key: answer.refusal for key, answer in found.items() if answer.refusal}
    late = "gave no answer in regenerate.answer_timeout=5 s, asked 1 times"
    assert refusals == {"4": f"{server.url} {late}"} and found.keys() == PROMPTS.keys()


def test_an_answer_is_as_long_as_the_context_of_the_server_allows(config: Config, server: CompletionServer):
    server.models[0]["max_model_len"] = 20

    found = asked(config, {"long": [5] * 17, "too long": [5] * 20})

    assert [body["max_tokens"] for body in server.bodies] == [3]
    assert len(found["long"].said_ids) <= 3
    assert found["too long"].refusal == f"the prompt has 20 tokens, the context of {server.url} 20"


def test_answers_leave_half_of_a_small_context_to_prompts(config: Config, server: CompletionServer):
    server.models[0]["max_model_len"] = 20
    asked(config, {"short": [5]})
    assert [body["max_tokens"] for body in server.bodies] == [10]


def test_the_smallest_context_counts(config: Config, servers: list[CompletionServer]):
    config.regenerate.endpoints = [server.url for server in servers]
    template = ChatTemplate(TOKENIZER, stop_token_ids=STOP_IDS)
    del servers[1].models[0]["max_model_len"]
    for known, expected in ((64, 64), (None, 256)):
        with endpoint_answerer(config, template, context=known) as answerer:
            assert answerer.context == expected
    del servers[0].models[0]["max_model_len"]
    with endpoint_answerer(config, template, context=None) as answerer:
        assert answerer.context is None


def test_without_ids_from_the_server_the_text_is_tokenised(
    config: Config, server: CompletionServer, caplog: pytest.LogCaptureFixture
):
    with_ids = asked(config)
    server.returns_ids = False
    template = ChatTemplate(TOKENIZER, stop_token_ids=STOP_IDS)
    with endpoint_answerer(config, template, context=256) as answerer:
        assert answerer.ids_from_text
        assert answerer.fingerprint == "served as tiny, text tokenised"

    from_text = asked(config)

    assert "returns no token ids" in caplog.text
    for key, answer in from_text.items():
        text = TOKENIZER.decode(with_ids[key].token_ids)
        assert answer.token_ids == TOKENIZER.encode(text, add_special_tokens=False)
        assert answer.stop_token == (None if answer.truncated else template.end_of_turn_id)
        assert answer.truncated == with_ids[key].truncated


def test_stop_texts_need_token_ids(config: Config, server: CompletionServer):
    server.returns_ids = False
    config.regenerate.stop = ["END"]
    with pytest.raises(ConfigError, match=r"regenerate\.stop must be empty .* look alike"):
        asked(config)


def test_a_key_is_read_from_its_file(config: Config, server: CompletionServer, tmp_path: Path):
    server.api_key = "secret"
    key_file = tmp_path / "key"
    config.regenerate.api_key_file = str(key_file)

    with pytest.raises(ConfigError, match=r"api_key_file must be a text file .* No such file"):
        asked(config)
    key_file.write_text("\n")
    with pytest.raises(ConfigError, match=r"api_key_file must hold a key, got the empty file"):
        asked(config)
    key_file.write_text("wrong\n")
    with pytest.raises(ConfigError, match=r"a key that the endpoint accepts, .* answers 401: Unauthorized"):
        asked(config)
    key_file.write_text("secret\n")
    assert asked(config).keys() == PROMPTS.keys()


def test_a_key_in_the_environment_is_not_sent(
    config: Config, server: CompletionServer, monkeypatch: pytest.MonkeyPatch
):
    server.api_key = "secret"
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with pytest.raises(ConfigError, match="answers 401"):
        asked(config)


def test_of_several_models_the_one_of_the_targets_name_is_asked(config: Config, server: CompletionServer):
    server.models = [{"id": "draft"}, {"id": "alias", "root": "elsewhere/tiny"}]
    asked(config, {"a": [5]})
    assert server.bodies[-1]["model"] == "alias"

    server.models = [{"id": "draft"}, {"id": "large"}]
    with pytest.raises(ConfigError, match=r"must serve target\.model models/tiny, .* serves draft, large"):
        asked(config)


def test_a_server_with_another_tokenizer_is_refused(config: Config, server: CompletionServer):
    server.tokenizer = make_tiny_tokenizer()
    server.tokenizer.decode = lambda ids: "other words"  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"has another tokenizer: .* 'other words' there"):
        asked(config)


@pytest.mark.parametrize("returns_ids", [True, False])
def test_a_server_that_puts_a_token_before_prompts_is_refused(
    config: Config, server: CompletionServer, returns_ids: bool
):
    server.added_first, server.returns_ids = [1], returns_ids
    with pytest.raises(ConfigError, match="must take token ids as they are"):
        asked(config)


def test_a_server_that_takes_no_token_ids_is_refused_at_the_start(config: Config, server: CompletionServer):
    server.status_for[len(PROBE)] = 400
    with pytest.raises(ConfigError, match=r"must take prompts as token ids .* made to answer 400"):
        asked(config)


@pytest.mark.parametrize("models", [[], None, ["tiny"], "<html>It works!</html>"])
def test_a_server_without_models_is_refused(config: Config, server: CompletionServer, models: object):
    server.models = models
    with pytest.raises(ConfigError, match=r"base URLs of OpenAI-compatible servers, .* names no model"):
        asked(config)


def test_a_url_that_is_no_base_url_is_named(config: Config, server: CompletionServer):
    config.regenerate.endpoints = [server.url.removesuffix("/v1")]
    with pytest.raises(ConfigError, match=r"must be base URLs .* which answers 404: Not Found"):
        asked(config)


def test_an_unreachable_endpoint_is_named_at_the_start(config: Config, servers: list[CompletionServer]):
    config.regenerate.endpoints = [servers[0].url, "http://127.0.0.1:9/v1"]
    with pytest.raises(TargetUnavailable, match=r"http://127\.0\.0\.1:9/v1 cannot be reached"):
        asked(config)
    assert servers[0].bodies == []


def test_a_missing_client_is_named_with_the_command_that_installs_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "eagle_rpc.answers.endpoint", raising=False)
    with pytest.raises(ConfigError, match=r"needs the package openai: pip install 'eagle-rpc\[openai\]'"):
        asked(config)


def test_the_configuration_names_endpoints_as_urls(config: Config):
    config.job.name = JobName.regenerate
    config.regenerate.endpoints = []
    with pytest.raises(ConfigError, match=r"regenerate\.endpoints must name a server"):
        check(config)
    config.regenerate.endpoints = ["localhost:8000"]
    with pytest.raises(ConfigError, match=r"regenerate\.endpoints must be URLs"):
        check(config)
