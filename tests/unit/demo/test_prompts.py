import json
import sys

import pytest

from eagle_rpc.config.choices import OnError
from eagle_rpc.data import read_chats
from eagle_rpc.demo.prompts import prepare_chitchat_prompts
from eagle_rpc.errors import DataError

QUESTIONS = [f"What do you think of the number {number}?" for number in range(20)]
LATE_QUESTIONS = [f"Well, do you like the number {number}?" for number in range(5)]
STATEMENTS = [f"I like the number {number} very much." for number in range(5)]
UNFIT = [
    "Who?",
    "What is it?" * 30,
    "What about caf\u00e9 number one?",
    "42 is what you think it is?",
    "what do you think, of the number 7?",
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed chitchat-dataset whose import would fail."""
    site = tmp_path / "site"
    info = site / "chitchat_dataset-0.9.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: chitchat-dataset\nVersion: 0.9.0\n")
    (site / "chitchat_dataset").mkdir()
    (site / "chitchat_dataset" / "__init__.py").write_text("raise ImportError('must not be imported')")
    texts = [*STATEMENTS, *UNFIT[:-1], *LATE_QUESTIONS, *QUESTIONS, *UNFIT]
    chats = {
        str(number): {"messages": [[{"text": text, "sender": "a"}], [{"text": text + " ", "sender": "b"}]]}
        for number, text in enumerate(texts)
    }
    (site / "chitchat_dataset" / "dataset.json").write_text(json.dumps(chats))
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    return site


def prompts(path):
    chats = read_chats(path, on_error=OnError.fail, needed_role="user").chats
    assert all([message.role for message in chat.messages] == ["user"] for chat in chats)
    return [chat.messages[0].content for chat in chats]


def test_questions_that_stand_alone_are_chosen_before_others(package, tmp_path):
    train, heldout = map(prompts, prepare_chitchat_prompts(tmp_path / "out", num_train=14, num_heldout=6))
    assert (len(train), len(heldout)) == (14, 6)
    assert {*train, *heldout} == set(QUESTIONS)
    train, heldout = map(prompts, prepare_chitchat_prompts(tmp_path / "more", num_train=22, num_heldout=6))
    assert set(QUESTIONS + LATE_QUESTIONS) < {*train, *heldout} < set(QUESTIONS + LATE_QUESTIONS + STATEMENTS)


def test_the_choice_depends_on_the_seed_alone_and_held_out_prompts_not_on_the_rest(package, tmp_path):
    def prepared(name, **options):
        return [
            path.read_bytes()
            for path in prepare_chitchat_prompts(
                tmp_path / name, **{"num_train": 10, "num_heldout": 5, **options}
            )
        ]

    assert prepared("one") == prepared("two")
    assert prepared("one")[1] == prepared("three", num_train=15)[1]
    assert prepared("one") != prepared("four", seed=1)


def test_existing_files_are_left_alone(package, tmp_path):
    train, heldout = prepare_chitchat_prompts(tmp_path / "out", num_train=10, num_heldout=5)
    train.write_text("mine")
    assert prepare_chitchat_prompts(tmp_path / "out", num_train=1, num_heldout=1) == (train, heldout)
    assert train.read_text() == "mine"
    heldout.unlink()
    prepare_chitchat_prompts(tmp_path / "out", num_train=10, num_heldout=5)
    assert len(prompts(train)) == 10
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["heldout.jsonl", "train.jsonl"]


def test_more_prompts_than_there_are_is_refused(package, tmp_path):
    with pytest.raises(DataError, match="must hold the 31 prompts asked for, got 30"):
        prepare_chitchat_prompts(tmp_path / "out", num_train=21, num_heldout=10)
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_absent_or_empty_is_named_with_the_command_that_installs_it(
    package, tmp_path, monkeypatch
):
    install = r"pip install --no-deps chitchat-dataset==0\.9\.0"
    (package / "chitchat_dataset" / "dataset.json").unlink()
    with pytest.raises(DataError, match=install):
        prepare_chitchat_prompts(tmp_path / "out", num_train=1, num_heldout=1)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(DataError, match=f"needs the package chitchat-dataset, got none: {install}"):
        prepare_chitchat_prompts(tmp_path / "out", num_train=1, num_heldout=1)
