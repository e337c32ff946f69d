"""The inputs of training are checked before anything heavy, and shown by `job=inspect`."""

import html.parser
import json
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from support.tiny_model import save_tiny_model

from eagle_rpc.config import Config
from eagle_rpc.config.choices import JobName, PromptSource, Resume
from eagle_rpc.errors import ConfigError, DataError, WaitTimeout
from eagle_rpc.jobs import inspect
from eagle_rpc.jobs.inputs import load_inputs, load_inputs_once
from eagle_rpc.topology import Cast, Role, Worker

CHATS = [
    ("what is the sea?", "the sea is deep."),
    ("<script>alert(1)</script>", "no <b>script</b> & no mark."),
    *((f"question {number}", f"answer {number}") for number in range(40)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Config:
    config = Config()
    config.job.name = JobName.inspect
    config.run.name, config.run.dir, config.run.cache_dir = "test", str(tmp_path), str(tmp_path / "cache")
    config.target.model = str(model)
    config.train.device = "cpu"
    config.data.prompt_source, config.data.max_length = PromptSource.files, 64
    config.data.train_path = str(tmp_path / "chats.jsonl")
    config.draft.vocab_size = 64
    config.inspect.output, config.inspect.num_samples = str(tmp_path / "page.html"), 5
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in [*CHATS, CHATS[0]]
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return config


def test_mistakes_that_do_not_depend_on_each_other_are_told_together(config: Config):
    config.data.train_path = "absent.jsonl"
    config.data.validation_path = "also_absent.jsonl"
    config.data.chat_template = "absent.jinja"
    config.draft.vocab_size = 100_000
    config.data.max_length = 100_000
    config.train.device = "cuda:9"
    config.topology.devices_per_target = 9
    with pytest.raises(ConfigError) as told:
        load_inputs(config)
    for part in (
        "7 mistakes in the inputs",
        "topology.devices_per_target must be at most the 8 decoder layers of LlamaForCausalLM, got 9",
        "absent.jsonl",
        "also_absent.jsonl",
        "absent.jinja",
        "draft.vocab_size must be at most the target's vocabulary",
        "data.max_length",
        "cuda:9",
    ):
        assert part in str(told.value)


def test_a_single_mistake_stands_alone(config: Config):
    config.data.train_path = "absent.jsonl"
    with pytest.raises(ConfigError, match=r"^absent\.jsonl"):
        load_inputs(config)


def test_an_id_beyond_the_vocabulary_in_the_validation_data_alone_is_found(config: Config, tmp_path: Path):
    record = {"input_ids": [1, 5, 7, 100_000], "loss_mask": [0, 0, 1, 1]}
    (tmp_path / "validation.jsonl").write_text(json.dumps(record) + "\n")
    config.data.validation_path = str(tmp_path / "validation.jsonl")
    with pytest.raises(
        ConfigError, match=r"validation\.jsonl, line 1: token ids must be below .* got 100000"
    ):
        load_inputs(config)


def cast_of(name: str) -> Cast:
    trainers = ("trainer0", "trainer1")
    role = Role.trainer if name in trainers else Role.target
    return Cast(Worker(name, frozenset([role]), int(name[-1])), ("target0",), trainers)


def test_a_mistake_ends_all_workers_and_only_the_first_trainer_tells_it(config: Config):
    config.data.train_path = "absent.jsonl"
    store, ended = dist.HashStore(), []
    others = [
        threading.Thread(
            target=lambda name=name: ended.append(
                load_inputs_once(config, cast_of(name), store, threading.Event())
            )
        )
        for name in ("trainer1", "target0")
    ]
    for other in others:
        other.start()
    with pytest.raises((ConfigError, DataError), match=r"absent\.jsonl"):
        load_inputs_once(config, cast_of("trainer0"), store, threading.Event())
    for other in others:
        other.join(30)
    assert ended == [None, None]


def test_a_first_trainer_that_never_starts_ends_the_others_with_a_reason(config: Config):
    config.rpc.start_timeout = 0.3
    with pytest.raises(WaitTimeout, match=r"waiting for trainer0 to start, 0 of 0 s"):
        load_inputs_once(config, cast_of("target0"), dist.HashStore(), threading.Event())


def test_a_worker_that_is_told_to_stop_waits_for_no_check(config: Config):
    stop = threading.Event()
    stop.set()
    assert load_inputs_once(config, cast_of("target0"), dist.HashStore(), stop) is None


def test_good_inputs_go_to_trainers_with_one_day_for_all(config: Config):
    config.data.date, config.train.resume = "2026-02-03", Resume.auto
    store = dist.HashStore()
    first, second, target = (
        load_inputs_once(config, cast_of(name), store, threading.Event())
        for name in ("trainer0", "trainer1", "target0")
    )
    assert first and second and target
    assert {one[0].data.date for one in (first, second, target)} == {"2026-02-03"}
    assert first[1].training.digest == second[1].training.digest
    assert target[1] is None


class Page(html.parser.HTMLParser):
    """Tags, references and marked text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.references, self.marked, self._in_mark = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href")]
        self._in_mark = tag == "mark"

    def handle_endtag(self, tag):
        self._in_mark = False

    def handle_data(self, data):
        if self._in_mark:
            self.marked.append(data)


def test_the_page_needs_no_network_and_shows_samples_as_text(config: Config, capsys: pytest.CaptureFixture):
    config.inspect.num_samples = len(CHATS) + 1
    config.data.validation_share = 0.0
    assert inspect.run(config) == 0
    text = Path(config.inspect.output).read_text()
    page = Page(text)
    # An icon without content spares a request for one.
    assert page.references == ["data:,"] and "http" not in text
    assert "script" not in page.tags and "b" not in page.tags
    assert {f"{answer}<|im_end|>" for _, answer in CHATS} <= set(page.marked)
    printed = " ".join(capsys.readouterr().out.split())
    assert "chats equal to another one: 1" in printed and "an answer ends with" in printed
    assert "draft.vocab_size" in printed and f"wrote {config.inspect.output}" in printed


def test_advice_names_the_next_vocabulary_that_covers_more(config: Config, capsys: pytest.CaptureFixture):
    config.draft.vocab_size = 4
    inspect.run(config)
    printed = " ".join(capsys.readouterr().out.split())
    assert "of the predicted tokens are outside the draft vocabulary: draft.vocab_size=" in printed
