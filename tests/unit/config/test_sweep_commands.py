"""What `--multirun` makes of a command line, before anything runs."""

from pathlib import Path

import pytest

from eagle_rpc.config.choices import JobName
from eagle_rpc.config.compose import load
from eagle_rpc.config.sweeps import Sweep, is_sweep, read_sweep
from eagle_rpc.errors import ConfigError


def sweep(*words: str) -> Sweep:
    return read_sweep(["--multirun", *words])


def answer_files(*words: str) -> list[str]:
    return [run.config.regenerate.output for run in sweep(*words).runs]


def test_both_spellings_of_hydra_ask_for_a_sweep():
    assert is_sweep(["--multirun"]) and is_sweep(["train.max_steps=1,2", "-m"])
    assert not is_sweep(["train.max_steps=1"])


def test_every_combination_is_a_run_with_a_readable_directory_of_its_own():
    found = sweep("run.name=tuned", "train.learning_rate=1e-3,3e-4", "draft.num_layers=range(1,3)")
    assert found.directory == Path("runs/tuned")
    assert [run.name for run in found.runs] == [
        "learning_rate=0.001__num_layers=1",
        "learning_rate=0.001__num_layers=2",
        "learning_rate=0.0003__num_layers=1",
        "learning_rate=0.0003__num_layers=2",
    ]
    second = found.runs[1]
    assert second.values == {"train.learning_rate": "0.001", "draft.num_layers": "2"}
    assert (second.config.train.learning_rate, second.config.draft.num_layers) == (1e-3, 2)
    assert second.config.run.dir == "runs/tuned/learning_rate=0.001__num_layers=2"
    assert second.config.run.name == "tuned/learning_rate=0.001__num_layers=2"
    assert second.config.serving.dir == f"{second.config.run.dir}/export"
    assert [job.name for job in second.jobs] == ["regenerate", "train", "export", "evaluate"]


@pytest.mark.parametrize(
    ("word", "field", "values"),
    [
        ("target=tiny,smollm2", ("target", "model"), None),
        ("draft.loss=kl,lk_alpha", ("draft", "loss"), None),
        ("draft.vocab_size=null,64", ("draft", "vocab_size"), [None, 64]),
        ("target.aux_layer_ids=[1,2,3],[1,3,5,7]", ("target", "aux_layer_ids"), [[1, 2, 3], [1, 3, 5, 7]]),
        ("data.train_path=a/b.jsonl,c/d.jsonl", ("data", "train_path"), ["a/b.jsonl", "c/d.jsonl"]),
        ("data.train_path='a, b.jsonl','c d'", ("data", "train_path"), ["a, b.jsonl", "c d"]),
        ("supervision=glob(*)", ("supervision", "encoding"), None),
        ("train.betas=choice([0.9,0.95],[0.8,0.9])", ("train", "betas"), [[0.9, 0.95], [0.8, 0.9]]),
    ],
)
def test_any_setting_or_group_is_swept_in_hydras_grammar(
    word: str, field: tuple[str, str], values: list | None
):
    runs = sweep(word).runs
    section, name = field
    found = [getattr(getattr(run.config, section), name) for run in runs]
    assert len({str(one) for one in found}) == len(runs) > 1
    assert values is None or found == values


@pytest.mark.parametrize(
    "words",
    [
        ["run.name=1e10", "train.max_steps=3,4", "regenerate.num_prompts=8"],
        [
            "job=train",
            "data=chats",
            "data.train_path=~/a.jsonl",
            "supervision=probs,logits",
            "run.dir='a, b'",
        ],
    ],
)
def test_a_run_has_the_settings_that_its_own_command_line_composes(words: list[str]):
    for run in sweep(*words).runs:
        named = [word for word in words if word.startswith("job=")]
        assert run.config == load(*named, *run.overrides)


def test_text_with_a_comma_in_quotes_is_one_value():
    (only,) = sweep("run.name='a, b'", "train.max_steps=3").runs
    assert only.config.run.dir == "runs/a, b/run" and only.values == {}


def test_fields_of_one_name_are_told_apart_and_long_names_are_cut():
    (run, *_) = sweep("target.dtype=float32,bfloat16", "regenerate.dtype=float32,bfloat16").runs
    assert run.name == "target.dtype=float32__regenerate.dtype=float32"
    long = sweep(f"data.train_path={'a' * 200},{'a' * 201}").runs
    assert len({one.name for one in long}) == 2 and all(len(one.name) <= 100 for one in long)


def test_runs_read_the_same_answers_unless_their_settings_make_others():
    assert (
        answer_files("run.name=a", "run.seed=0,1", "target.aux_layer_ids=[1,2,3],[1,2,3,4]")
        == ["runs/a/answers.jsonl"] * 4
    )
    assert answer_files("run.name=a", "regenerate.num_prompts=8,16", "run.seed=0,1") == [
        "runs/a/answers_num_prompts=8__seed=0.jsonl",
        "runs/a/answers_num_prompts=8__seed=0.jsonl",
        "runs/a/answers_num_prompts=16__seed=0.jsonl",
        "runs/a/answers_num_prompts=16__seed=0.jsonl",
    ]
    # Sampled answers depend on the seed.
    assert len(set(answer_files("run.seed=0,1", "regenerate.temperature=0.7"))) == 2
    assert len(set(answer_files("target.model=a,b", "target=hf"))) == 2
    trains_on = [run.config.data.train_path for run in sweep("regenerate.num_prompts=8,16").runs]
    assert trains_on == answer_files("regenerate.num_prompts=8,16")


def test_one_job_of_several_runs():
    runs = sweep("job=train", "data=chats", "data.train_path=a.jsonl", "train.max_steps=1,2").runs
    assert [run.jobs for run in runs] == [[JobName.train]] * 2
    assert not any(word.startswith("job=") for run in runs for word in run.overrides)


def test_all_mistakes_of_all_combinations_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        sweep("train.learning_rate=1e-3,-1", "draft.num_layers=1,0", "evaluate.num_prompts=0")
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 mistakes in the sweep:"
    assert "train.learning_rate must be positive or null, got -1.0" in str(caught.value)
    assert "learning_rate=0.001__num_layers=0: " in str(caught.value)
    with pytest.raises(ConfigError, match=r"^evaluate\.num_prompts must be positive, got 0$"):
        sweep("train.learning_rate=1e-3,3e-4", "evaluate.num_prompts=0")
    with pytest.raises(
        ConfigError, match=r"^train\.max_step is not a setting; did you mean train\.max_steps\?$"
    ):
        sweep("train.max_step=1,2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.name=a,b"], r"run\.name must have one value with --multirun, got several"),
        (["job=train,export"], r"job must have one value with --multirun"),
        (["serving.dir=out", "train.max_steps=1,2"], r"serving\.dir must be each run's own .* got out"),
        (
            ["train.max_steps=1,2", "train.max_steps=3,4"],
            r"train\.max_steps must be swept once, got it 2 times",
        ),
        (["train.max_steps=1,1"], r"must name every combination once, got max_steps=1 2 times"),
        (
            ["train.learning_rate=interval(0,1)"],
            r"must have single values, choices or ranges, got train\.learning",
        ),
        (["train.max_steps=1,2", "--cfg"], r"--multirun must go with overrides alone, got --cfg"),
        (["job=serve", "target.max_sessions=1,2"], r"must go with a job that ends, got job=serve"),
        (["data=self", "prompts.temperature=0.5,1.0"], r"prompts must be made with one set of settings"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        sweep(*words)
