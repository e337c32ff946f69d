"""Absent files of prompts are made by `data.prompt_source`."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_tokenizer import VOCAB_SIZE, make_tiny_tokenizer, save_with_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from eagle_rpc.answers.answerer import Answer
from eagle_rpc.answers.self_prompts import SelfPrompts, open_log
from eagle_rpc.config import Config
from eagle_rpc.config.choices import DType, PromptSource
from eagle_rpc.config.schema import DataConfig, PromptsConfig, RunConfig
from eagle_rpc.data import ChatTemplate
from eagle_rpc.errors import ConfigError, DataError
from eagle_rpc.jobs import prompts

END = 2


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB_SIZE, num_hidden_layers=2, max_position_embeddings=128, **size)
    )
    # Many tokens end a turn, so that some attempts end before their time.
    model.generation_config.eos_token_id = [END, *range(3, VOCAB_SIZE, 8)]
    directory = tmp_path_factory.mktemp("model")
    return save_with_tokenizer(model, directory)


@pytest.fixture
def config(model_dir: Path, tmp_path: Path) -> Config:
    config = Config()
    config.run.dir, config.run.cache_dir, config.run.threads = str(tmp_path), str(tmp_path / "cache"), 1
    config.target.model, config.target.device = str(model_dir), "cpu"
    config.data.prompt_source = PromptSource.self
    config.regenerate.prompts = str(tmp_path / "train.jsonl")
    config.evaluate.prompts = str(tmp_path / "heldout.jsonl")
    config.regenerate.batch_size, config.regenerate.dtype = 4, DType.float32
    config.prompts = PromptsConfig(
        num_train=4, num_heldout=2, max_tokens=32, min_chars=4, max_attempts_per_prompt=100
    )
    return config


def texts(path: str) -> list[str]:
    return [json.loads(line)["messages"][0]["content"] for line in Path(path).read_text().splitlines()]


def both(config: Config) -> tuple[list[str], list[str]]:
    return texts(config.evaluate.prompts), texts(config.regenerate.prompts)


def remove_prompts(config: Config) -> Path:
    for path in (config.evaluate.prompts, config.regenerate.prompts):
        Path(path).unlink()
    return Path(config.run.dir) / "train.attempts.jsonl"


class Scripted:
    """Answers attempt n by `said[n]`, two at a time in the wrong order; the last text goes on for ever."""

    fingerprint, context, num_generated = "scripted", None, 0

    def __init__(self, *said: Answer | str) -> None:
        self._said = said
        self._waiting: list[str] = []

    def submit(self, key: str, prompt: Sequence[int]) -> None:
        self._waiting.append(key)

    def answers(self) -> Iterator[Answer]:
        while self._waiting:
            some, self._waiting = self._waiting[:2], self._waiting[2:]
            yield from map(self._answer, reversed(some))

    def _answer(self, key: str) -> Answer:
        said = self._said[min(int(key), len(self._said) - 1)]
        if isinstance(said, Answer):
            return Answer(key, said.token_ids, said.truncated, refusal=said.refusal)
        return Answer(key, make_tiny_tokenizer()(said)["input_ids"], truncated=False, stop_token=END)


def make(path: Path, answerer: Scripted, **settings: Any) -> list[str]:
    asked = PromptsConfig(num_train=1, num_heldout=1, max_attempts_per_prompt=5)
    for name, value in settings.items():
        setattr(asked, name, value)
    template = ChatTemplate(make_tiny_tokenizer(), stop_token_ids=[END])
    with open_log(path) as log:
        return SelfPrompts(asked, answerer, template, log, seed=0, date="2026-01-31", ahead=4).make()


FIRST, SECOND, THIRD = "Why is the sea so deep?", "Tell me about the capital", "Name five of the fish"


def test_prompts_are_kept_in_the_order_of_attempts_and_every_fault_is_counted(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)
    cut, refused = Answer("", [9, 9], truncated=True), Answer("", [], truncated=False, refusal="busy")
    said = [cut, "Why?", FIRST, refused, "why is the sea so deep", "aaaa bbbb " * 20, f" {SECOND}\n", THIRD]
    assert make(tmp_path / "log", Scripted(*said)) == [FIRST, SECOND]
    assert "2 of 7 attempts kept" in caplog.text
    for fault in ("cut", "too short", "refused by an endpoint", "duplicates", "repetitive"):
        assert f"1 {fault}" in caplog.text


def test_more_prompts_later_go_on_from_the_log(tmp_path: Path):
    said = [FIRST, "Why?", SECOND, "So?", THIRD]
    assert make(tmp_path / "log", Scripted(*said)) == [FIRST, SECOND]
    unasked = Scripted("never", "never", "never", *said[3:])
    assert make(tmp_path / "log", unasked, num_train=2) == [FIRST, SECOND, THIRD]


def test_a_target_that_gives_too_few_ends_with_the_counts(tmp_path: Path):
    rule = "2 good prompts in prompts.max_attempts_per_prompt=5 attempts each"
    with pytest.raises(DataError, match=f"{rule}, got 1 of 10 attempts kept; left out: 9 duplicates"):
        make(tmp_path / "log", Scripted(FIRST))
    with pytest.raises(DataError, match="got 1 of 105 attempts kept"):
        make(tmp_path / "early", Scripted(FIRST), num_train=10_000)


def test_a_log_of_other_settings_or_of_another_job_is_refused(tmp_path: Path):
    make(tmp_path / "log", Scripted(FIRST, SECOND))
    before = (tmp_path / "log").read_bytes()
    with pytest.raises(
        ConfigError, match=r"same settings, got temperature 1.0, now 0.5: choose another run.name"
    ):
        make(tmp_path / "log", Scripted(FIRST, SECOND), temperature=0.5)
    with open_log(tmp_path / "log"), pytest.raises(ConfigError, match="must not be in use"):
        make(tmp_path / "log", Scripted(FIRST))
    assert (tmp_path / "log").read_bytes() == before
    (tmp_path / "foreign").write_text("mine")
    with pytest.raises(ConfigError, match="absent or a log"):
        make(tmp_path / "foreign", Scripted(FIRST))
    assert (tmp_path / "foreign").read_text() == "mine"


def test_the_target_writes_prompts_apart_from_those_held_out(config: Config):
    prompts.ensure_prompts(config, config.regenerate.prompts)
    heldout, train = both(config)
    assert (len(heldout), len(train)) == (2, 4) and len({*heldout, *train}) == 6


def test_prompts_depend_on_the_seed_and_not_on_the_batch(config: Config):
    prompts.ensure_prompts(config, config.regenerate.prompts)
    first = both(config)
    remove_prompts(config).unlink()
    config.regenerate.batch_size = 9
    prompts.ensure_prompts(config, config.regenerate.prompts)
    assert both(config) == first
    remove_prompts(config).unlink()
    config.run.seed = 1
    prompts.ensure_prompts(config, config.regenerate.prompts)
    assert both(config) != first


def test_a_kill_at_any_byte_of_the_log_changes_nothing(config: Config):
    prompts.ensure_prompts(config, config.regenerate.prompts)
    first = both(config)
    log = remove_prompts(config)
    whole = log.read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 1):
        log.write_bytes(whole[:size])
        prompts.ensure_prompts(config, config.regenerate.prompts)
        assert both(config) == first and log.read_bytes() == whole
        remove_prompts(config)


def test_only_absent_files_are_written_and_own_held_out_prompts_are_not_trained_on(config: Config):
    prompts.ensure_prompts(config, config.regenerate.prompts)
    _, train = both(config)
    own = json.dumps({"prompt": train[0]}) + "\n"
    Path(config.evaluate.prompts).write_text(own)
    Path(config.regenerate.prompts).unlink()
    prompts.ensure_prompts(config, config.regenerate.prompts)
    assert texts(config.regenerate.prompts) == train[1:]
    assert Path(config.evaluate.prompts).read_text() == own


def test_the_embedded_prompts_are_written_only_for_a_job_whose_file_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[Any] = []
    monkeypatch.setattr(prompts, "prepare_chitchat_prompts", lambda *args, **settings: written.append(args))
    own, absent = tmp_path / "own.jsonl", tmp_path / "absent.jsonl"
    own.write_text("")
    config = Config(
        run=RunConfig(cache_dir=str(tmp_path)), data=DataConfig(prompt_source=PromptSource.chitchat)
    )
    prompts.ensure_prompts(config, str(own))
    assert not written
    prompts.ensure_prompts(config, str(absent))
    assert written
