"""Text on the command line stays text, whatever Hydra's grammar would make of it."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st

from eagle_rpc.config.compose import load, write_config
from eagle_rpc.config.overrides import for_hydra
from eagle_rpc.config.rules import settings_of
from eagle_rpc.errors import ConfigError

PRINTABLE = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1)


def in_quotes(text: str) -> bool:
    return text[0] == text[-1] and text[0] in "'\""


@given(PRINTABLE.filter(lambda text: not in_quotes(text)))
@example("12e4567")
@example("a\\")
@example("\\'")
@example("${run.seed} and more")
def test_hydra_reads_any_text_as_it_was_typed(text: str):
    for name in ("run.name", "+run.name", "data.train_path", "target.model"):
        parsed = OverridesParser.create().parse_override(for_hydra(f"{name}={text}"))
        assert parsed.value() == text


@given(st.lists(st.text("abc1e.-~#=()[]{}: ", min_size=1).map(str.strip).filter(bool)))
def test_hydra_reads_any_list_of_texts_as_it_was_typed(texts: list[str]):
    parsed = OverridesParser.create().parse_override(for_hydra(f"regenerate.stop=[{', '.join(texts)}]"))
    assert [str(text) for text in parsed.value()] == texts


@pytest.mark.parametrize(
    "text", ["12e4567", "1e10", "true", "null", "2026-01-01", "a, b", "ü [1] #2 = {3} it's"]
)
def test_a_name_of_a_run_is_the_typed_text_also_when_the_configuration_is_read_again(
    tmp_path: Path, text: str
):
    config = load(f"run.name={text}")
    assert config.run.name == text and config.run.dir == f"runs/{text}"
    write_config(config, tmp_path / "config.yaml")
    assert load(directory=tmp_path) == config


def test_values_that_are_no_text_and_forms_of_hydra_keep_their_meaning():
    config = load(
        "run.name='quoted'",
        "data.validation_path=null",
        "data.train_path=${run.dir}/a b.jsonl",
        "regenerate.stop=[1e5, 'a, b', \"c\"]",
        "train.learning_rate=1e-4",
        "run.seed=3",
    )
    assert config.run.name == "quoted" and config.data.validation_path is None
    assert config.data.train_path == "runs/quoted/a b.jsonl"
    assert config.regenerate.stop == ["1e5", "a, b", "c"]
    assert (config.train.learning_rate, config.run.seed) == (1e-4, 3)


def test_the_program_itself_takes_text_as_it_is_typed(tmp_path: Path):
    path = "~/ü [1] #2 = {3}, it's.jsonl"
    command = [sys.executable, "-m", "eagle_rpc", "--cfg", "job", "run.name=1e10", f"data.train_path={path}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert "  name: '1e10'\n" in done.stdout and "dir: runs/${run.name}" in done.stdout
    assert "~/ü [1] #2 = {3}, it" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.name=", "run.name must be at most 128 printable characters and not empty, got ''"),
        ("run.dir= ", "run.dir must not be empty, got ' '"),
        ("data.validation_path=", "data.validation_path must not be empty or null, got ''"),
        ("target.device=gpu", "target.device must be auto, cpu, cuda or cuda:N, got gpu"),
        ("train.device=cuda:x", "train.device must be auto, cpu, cuda or cuda:N, got cuda:x"),
        ("data.sources=[{weight: 2}]", "data.sources[0].path must not be empty, got ''"),
        ("data.sources=[{path: a, weight: 0}]", "data.sources[0].weight must be positive, got 0.0"),
    ],
)
def test_a_text_that_cannot_be_meant_is_refused_with_its_rule(override: str, message: str):
    with pytest.raises(ConfigError) as raised:
        load(override)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        (
            "data.sources=[{path: ~/a b/c#1.jsonl, weight: 2}]",
            'data.sources=[{path: "~/a b/c#1.jsonl", weight: 2}]',
        ),
        ("data.template_arguments={who: Anna's dog}", """data.template_arguments={who: "Anna's dog"}"""),
    ],
)
def test_where_hydra_needs_quotes_the_message_shows_them(override: str, quoted: str):
    with pytest.raises(ConfigError) as raised:
        load(override)
    assert str(raised.value).endswith(f"needs quotes, as {shlex.quote(quoted)}")
    load(quoted)


def test_home_is_expanded_in_every_path_and_nowhere_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = [setting.path for setting in settings_of(load("target.model=~")) if setting.is_path]
    assert {"run.dir", "run.cache_dir", "data.train_path", "target.model", "rpc.token_file"} <= set(paths)
    config = load(
        "run.name=~mine",
        *(f"{path}=~/{path}" for path in paths),
        'data.sources=[{path: "~/more"}]',
    )
    for setting in settings_of(config):
        if setting.path in paths:
            assert setting.value == f"/home/me/{setting.path}"
    assert config.data.sources[0].path == "/home/me/more" and config.run.name == "~mine"


def test_dicts_take_new_keys_as_the_meaning_of_the_setting_shows_them():
    whole = load("data.template_arguments={enable_thinking: false}")
    single = load("data.template_arguments.enable_thinking=false")
    assert whole == single and whole.data.template_arguments == {"enable_thinking": False}
    assert load("target=tiny", "target.random.rope_theta=5").target.random["rope_theta"] == 5
