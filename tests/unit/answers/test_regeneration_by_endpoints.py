"""`job=regenerate` with an OpenAI-compatible server, which a small server in this process stands for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_model import save_tiny_model, write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("openai", reason="the extra openai is not installed")

from support.completion_server import CompletionServer

from eagle_rpc.config import Config
from eagle_rpc.config.choices import AnswerBackend, DType, OnError
from eagle_rpc.errors import ConfigError, DataError
from eagle_rpc.jobs import regenerate

NUM_PROMPTS = 6


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(model_dir: Path) -> Iterator[CompletionServer]:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with CompletionServer(model, tokenizer, [tokenizer.eos_token_id]) as server:
        yield server


@pytest.fixture
def config(server: CompletionServer, model_dir: Path, tmp_path: Path) -> Config:
    config = Config()
    config.run.name, config.run.dir, config.run.threads = "test", str(tmp_path), 1
    config.run.cache_dir = str(tmp_path / "cache")
    config.target.model, config.target.device = str(model_dir), "cpu"
    settings = config.regenerate
    settings.prompts = str(write_prompts(tmp_path / "prompts.jsonl", NUM_PROMPTS))
    settings.output = str(tmp_path / "answers.jsonl")
    settings.dtype, settings.max_new_tokens = DType.float32, 12
    settings.backend, settings.endpoints = AnswerBackend.openai, [server.url]
    return config


def written(config: Config) -> dict[str, list[Any]]:
    """Turns and kept ids by prompt."""
    records = [json.loads(line) for line in Path(config.regenerate.output).read_text().splitlines()]
    return {record["prompt"]: [record["messages"], record["answers"]] for record in records}


def test_an_endpoint_gives_the_answers_of_the_own_engine(config: Config, tmp_path: Path):
    assert regenerate.run(config) == 0
    by_endpoint = written(config)
    config.regenerate.backend = AnswerBackend.engine
    config.regenerate.output = str(tmp_path / "engine.jsonl")
    assert regenerate.run(config) == 0

    assert by_endpoint == written(config) and len(by_endpoint) == NUM_PROMPTS


def test_a_second_run_asks_only_for_prompts_without_an_answer(config: Config, server: CompletionServer):
    config.regenerate.num_prompts = NUM_PROMPTS - 2
    regenerate.run(config)
    config.regenerate.num_prompts = None
    regenerate.run(config)

    assert len(server.bodies) == len({tuple(body["prompt"]) for body in server.bodies}) == NUM_PROMPTS
    assert len(written(config)) == NUM_PROMPTS


def test_answers_of_another_model_are_not_mixed(config: Config, server: CompletionServer):
    regenerate.run(config)
    server.models = [{"id": "other"}]
    with pytest.raises(ConfigError, match="target served as tiny, now served as other"):
        regenerate.run(config)


def test_refused_prompts_are_treated_as_on_error_says(
    config: Config, server: CompletionServer, caplog: pytest.LogCaptureFixture
):
    server.most_prompt_tokens = 0

    config.data.on_error = OnError.fail
    with pytest.raises(DataError, match=r"prompts\.jsonl, line \d: .*/v1 answers 400: .* too long"):
        regenerate.run(config)
    config.data.on_error = OnError.skip
    with caplog.at_level("INFO", logger="eagle_rpc"):
        assert regenerate.run(config) == 0

    assert f"refused by an endpoint {NUM_PROMPTS}" in caplog.text
    assert written(config) == {}
