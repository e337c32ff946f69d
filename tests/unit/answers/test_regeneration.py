"""`job=regenerate` on a tiny stored model."""

import collections
import json
import logging
from pathlib import Path

import pytest
import torch
from support.tiny_tokenizer import CHATML, VOCAB_SIZE, make_tiny_tokenizer, save_with_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from eagle_rpc.answers import own
from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.answers.output import open_answers
from eagle_rpc.config import Config
from eagle_rpc.config.choices import DType, OnError, PromptSource
from eagle_rpc.data import ChatTemplate, read_chats
from eagle_rpc.errors import ConfigError, DataError, UnsupportedTarget
from eagle_rpc.jobs import regenerate

MAX_NEW_TOKENS = 8
CHATS = [
    [("user", "what is the capital of France?")],
    [
        ("user", "tell me something about the sea"),
        ("assistant", "No."),
        ("user", "and the fish?"),
        ("user", "why?"),
    ],
    [
        ("system", "tell what is asked"),
        ("user", "what is blue?"),
        ("assistant", "the sea"),
        ("user", "is it deep?"),
    ],
    *(
        [("user", f"tell me something about {word}"), ("assistant", "Yes."), ("user", "why?")]
        for word in "abcdefgh"
    ),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    # Many tokens end an answer, so that about half of them end before their time.
    model.generation_config.eos_token_id = [2, *range(0, VOCAB_SIZE, 14)]
    directory = tmp_path_factory.mktemp("model")
    return save_with_tokenizer(model, directory)


@pytest.fixture
def config(model_dir: Path, tmp_path: Path) -> Config:
    config = Config()
    config.run.name, config.run.dir, config.run.cache_dir, config.run.threads = (
        "test",
        str(tmp_path),
        str(tmp_path / "cache"),
        1,
    )
    config.target.model, config.target.device = str(model_dir), "cpu"
    config.data.prompt_source, config.data.on_error = PromptSource.files, OnError.fail
    config.regenerate.prompts, config.regenerate.output = (
        str(tmp_path / "prompts.jsonl"),
        str(tmp_path / "answers.jsonl"),
    )
    config.regenerate.batch_size, config.regenerate.max_new_tokens = 3, MAX_NEW_TOKENS
    config.regenerate.dtype = DType.float32
    write_prompts(config, CHATS)
    return config


def write_prompts(config: Config, chats) -> None:
    records = ({"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats)
    Path(config.regenerate.prompts).write_text("".join(json.dumps(record) + "\n" for record in records))


def records_of(config: Config) -> dict[str, dict]:
    records = [json.loads(line) for line in Path(config.regenerate.output).read_text().splitlines()]
    by_prompt = {f"{record['prompt']}/{record['number']}": record for record in records}
    assert len(by_prompt) == len(records)
    return by_prompt


def reference(model_dir: Path, chat) -> tuple[list[dict], bool]:
    """The chat as transformers answers it turn by turn, and whether its last answer is cut off."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(model_dir).eval(), make_tiny_tokenizer()
    eos = model.generation_config.eos_token_id
    said: list[dict] = []
    for role, content in chat:
        if role == "assistant":
            continue
        said.append({"role": role, "content": content})
        if role == "system":
            continue
        prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        ids = model.generate(prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0)[
            0, prompt.shape[1] :
        ].tolist()
        truncated = ids[-1] not in eos
        text = tokenizer.decode(ids if truncated else ids[:-1], skip_special_tokens=True)
        text = text.rstrip("\ufffd") if truncated else text
        if not text.strip():
            return said[:-1], False
        said.append({"role": "assistant", "content": text})
        if truncated:
            return said, True
    return said, False


def test_every_turn_is_answered_as_the_target_answers_it_after_its_own_answers(
    config: Config, model_dir: Path
):
    assert regenerate.run(config) == 0
    expected = [reference(model_dir, chat) for chat in CHATS]
    expected = [
        (said, truncated) for said, truncated in expected if any(turn["role"] == "assistant" for turn in said)
    ]
    found = [(record["messages"], record["truncated"]) for record in records_of(config).values()]
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, expected))
    # The case is worth something: cut-off answers, complete ones, and chats of several answers.
    assert {truncated for _, truncated in expected} == {True, False}
    assert max(len(said) for said, _ in expected) >= 4


def test_the_output_is_a_readable_file_of_chats(config: Config):
    regenerate.run(config)
    assert len(read_chats(config.regenerate.output, on_error=OnError.fail).chats) == len(records_of(config))


def test_a_second_run_asks_only_what_is_new(config: Config, monkeypatch: pytest.MonkeyPatch):
    write_prompts(config, CHATS[:4])
    regenerate.run(config)
    before = Path(config.regenerate.output).read_bytes()
    first = len(records_of(config))
    write_prompts(config, CHATS)
    asked = []
    submit = AnswerEngine.submit

    def noted_submit(self, key, prompt):
        if "/" in key:  # not the probe's
            asked.append(key)
        submit(self, key, prompt)

    monkeypatch.setattr(AnswerEngine, "submit", noted_submit)
    regenerate.run(config)
    assert Path(config.regenerate.output).read_bytes().startswith(before)
    assert {key.partition("/")[0] for key in asked}.isdisjoint(
        json.loads(line)["prompt"] for line in before.splitlines()
    )
    assert len(records_of(config)) > first


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_run_that_was_killed_at_any_byte_is_completed_to_the_same_chats(config: Config, temperature: float):
    config.regenerate.temperature = temperature
    regenerate.run(config)
    whole, expected = Path(config.regenerate.output).read_bytes(), records_of(config)
    middle = whole.index(b"\n", len(whole) // 2)
    for killed_at in (0, 1, middle - 1, middle, middle + 1, len(whole) - 1):
        Path(config.regenerate.output).write_bytes(whole[:killed_at])
        regenerate.run(config)
        assert records_of(config) == expected


def test_equal_prompts_are_asked_once(config: Config):
    write_prompts(config, [CHATS[1], [turn for turn in CHATS[1] if turn[0] != "assistant"]])
    regenerate.run(config)
    assert len(records_of(config)) == 1


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("max_new_tokens", 9, "max_new_tokens 8, now 9"), ("temperature", 0.5, "0.0, now 0.5")],
)
def test_answers_of_other_settings_are_not_mixed(config: Config, field: str, value, said: str):
    regenerate.run(config)
    before = Path(config.regenerate.output).read_bytes()
    setattr(config.regenerate, field, value)
    with pytest.raises(ConfigError, match=said):
        regenerate.run(config)
    assert Path(config.regenerate.output).read_bytes() == before


LINE = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(LINE) + "\n",
        json.dumps(LINE),
        json.dumps([LINE, LINE]),
        json.dumps([LINE], indent=1),
        json.dumps({"prompt": "what is it?"}) + "\n",
        json.dumps({"prompt": "what is it?"}),
        "some notes",
    ],
)
def test_not_a_byte_is_written_to_a_file_that_is_not_of_this_job(config: Config, content: str):
    Path(config.regenerate.output).write_text(content)
    with pytest.raises(
        ConfigError, match=r"regenerate\.output must be absent or a file that this job has written"
    ):
        regenerate.run(config)
    assert Path(config.regenerate.output).read_text() == content


def test_the_file_of_the_prompts_is_not_the_output(config: Config, tmp_path: Path):
    before = Path(config.regenerate.prompts).read_bytes()
    for same in (config.regenerate.prompts, str(tmp_path / "link.jsonl")):
        if same != config.regenerate.prompts:
            Path(same).symlink_to(config.regenerate.prompts)
        config.regenerate.output = same
        with pytest.raises(ConfigError, match="the file of the prompts"):
            regenerate.run(config)
    assert Path(config.regenerate.prompts).read_bytes() == before


def test_a_second_regeneration_of_one_output_is_refused(config: Config):
    held = open_answers(config.regenerate.output, prompts=config.regenerate.prompts)
    with held, pytest.raises(ConfigError, match="another process writes"):
        regenerate.run(config)
    assert regenerate.run(config) == 0


@pytest.mark.parametrize("name", ["", "prompts.jsonl/answers.jsonl"])
def test_an_output_that_cannot_be_written_is_named(config: Config, tmp_path: Path, name: str):
    config.regenerate.output = str(tmp_path / name)
    with pytest.raises(ConfigError, match=r"regenerate\.output must be writable"):
        regenerate.run(config)


def test_training_sees_the_ids_that_were_asked_and_said(config: Config):
    regenerate.run(config)
    template = ChatTemplate(make_tiny_tokenizer())
    chats = read_chats(config.regenerate.output, on_error=OnError.fail).chats
    for chat, record in zip(chats, records_of(config).values(), strict=True):
        samples, last = template.samples(chat), record["answers"][-1]
        supervised = [
            token for sample in samples for token, said in zip(sample.ids, sample.mask, strict=True) if said
        ]
        assert supervised == [token for answer in record["answers"] for token in answer["answer_ids"]]
        assert samples[-1].ids == last["prompt_ids"] + last["answer_ids"]
        assert record["truncated"] == last["truncated"]
    # Ids that no text gives back: the tokens that end answers are not those of the template.
    ends = {
        record["answers"][-1]["answer_ids"][-1]
        for record in records_of(config).values()
        if not record["truncated"]
    }
    assert ends - {2}


def test_answers_of_another_tokenizer_are_not_trained(config: Config):
    regenerate.run(config)
    other = make_tiny_tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(DataError, match="tokenizer"):
        ChatTemplate(other).samples(read_chats(config.regenerate.output, on_error=OnError.fail).chats[0])


def test_a_prompt_gets_several_answers_of_its_own(config: Config):
    config.regenerate.temperature, config.regenerate.answers_per_prompt = 1.0, 3
    write_prompts(config, CHATS)
    regenerate.run(config)
    of_prompt = collections.defaultdict(dict)
    for record in records_of(config).values():
        of_prompt[record["prompt"]][record["number"]] = json.dumps(record["answers"])
    assert any(set(answers) == {0, 1, 2} for answers in of_prompt.values())
    assert any(len(set(answers.values())) == 3 for answers in of_prompt.values())


def test_the_share_of_cut_answers_is_a_warning(config: Config, caplog: pytest.LogCaptureFixture):
    regenerate.run(config)
    assert "% of the answers were cut at 8 tokens" in caplog.text


def test_a_context_too_small_for_the_answers_bounds_them_and_says_so(config: Config, caplog):
    config.regenerate.max_new_tokens = 2048
    write_prompts(config, CHATS[:1])
    with caplog.at_level(logging.INFO):
        regenerate.run(config)
    assert "context of 256 tokens has room for prompts of 128 and answers of 128 tokens" in caplog.text


def test_a_model_that_the_engine_does_not_decode_is_answered_all_the_same(
    config: Config, monkeypatch, caplog
):
    regenerate.run(config)
    expected = records_of(config)
    Path(config.regenerate.output).unlink()

    def refuse(model):
        raise UnsupportedTarget("the batched engine cannot decode it")

    monkeypatch.setattr(own, "probe_engine", refuse)
    regenerate.run(config)
    assert records_of(config) == expected
    assert "transformers' generate answers, which is slower" in caplog.text


def test_the_day_of_the_first_answers_is_kept(config: Config):
    dated = Path(config.run.dir) / "dated.jinja"
    dated.write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    config.data.chat_template, config.data.date = str(dated), "2026-02-03"
    write_prompts(config, CHATS[:2])
    regenerate.run(config)
    config.data.date = None
    write_prompts(config, CHATS)
    regenerate.run(config)
    assert {record["date"] for record in records_of(config).values()} == {"2026-02-03"}


def test_overlong_prompts_are_left_out_and_counted(config: Config, caplog: pytest.LogCaptureFixture):
    write_prompts(config, [[("user", "why " * 300)], CHATS[3]])
    with caplog.at_level(logging.INFO):
        regenerate.run(config)
    # The context of 256 tokens is narrower than regenerate.max_prompt_tokens.
    assert f"prompts over {256 - MAX_NEW_TOKENS} tokens 1" in caplog.text
    assert [record["messages"][0]["content"] for record in records_of(config).values()] == [CHATS[3][0][1]]


def test_num_prompts_takes_the_first_chats(config: Config):
    write_prompts(config, [CHATS[3], CHATS[4], CHATS[5]])
    config.regenerate.num_prompts = 1
    regenerate.run(config)
    assert [record["messages"][0]["content"] for record in records_of(config).values()] == [CHATS[3][0][1]]


def test_a_target_without_tokenizer_is_refused(config: Config):
    config.target.random = {"model_type": "llama"}
    with pytest.raises(ConfigError, match="tokenizer"):
        regenerate.run(config)
