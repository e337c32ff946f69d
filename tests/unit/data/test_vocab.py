import json
import logging

import pytest
import torch
from support.tiny_tokenizer import VOCAB_SIZE, make_tiny_tokenizer

from eagle_rpc.data import ChatDataset, Example, build_vocab_mapping
from eagle_rpc.errors import ConfigError, DataError

TOKENIZER = make_tiny_tokenizer()


def dataset_of(*sequences):
    """Each sequence is ids with the unsupervised first ones in a tuple: `((9, 9), 5, 6)`."""
    examples = []
    for prompt, *answer in sequences:
        mask = torch.arange(len(prompt) + len(answer)) >= len(prompt)
        examples.append(Example(torch.tensor([*prompt, *answer]), mask))
    return ChatDataset(examples, max_length=100)


def build(dataset, tmp_path, *, size=8, target=VOCAB_SIZE):
    return build_vocab_mapping(
        dataset, tokenizer=TOKENIZER, target_vocab_size=target, draft_vocab_size=size, cache_dir=tmp_path
    )


def test_what_counts_is_the_token_after_each_supervised_one():
    everywhere, guessed = dataset_of(((50, 51), 52, 53, 54), ((50,), 53, 54)).token_counts(VOCAB_SIZE)
    assert {index: int(guessed[index]) for index in guessed.nonzero()[0]} == {53: 1, 54: 2}
    assert {index: int(everywhere[index]) for index in everywhere.nonzero()[0]} == {
        50: 2,
        51: 1,
        52: 1,
        53: 2,
        54: 2,
    }


def test_special_tokens_come_first_then_frequent_ones_then_low_ids(tmp_path):
    dataset = dataset_of(((9,), 9, 70, 70, 70, 60), ((9,), 9, 60, 70, 80))
    mapping, coverage = build(dataset, tmp_path, size=7)
    assert mapping.selected_token_ids.tolist() == [0, 1, 2, 3, 60, 70, 80]
    assert coverage == 1.0


def test_equally_frequent_tokens_are_taken_by_lower_id_and_coverage_counts_the_rest(tmp_path):
    dataset = dataset_of(((9,), 9, 90, 80, 70, 60, 60))
    mapping, coverage = build(dataset, tmp_path, size=5)
    assert mapping.selected_token_ids.tolist() == [0, 1, 2, 60, 70]
    assert coverage == pytest.approx(3 / 5)


def test_special_tokens_that_the_target_has_no_row_for_are_left_out(tmp_path):
    mapping, _ = build(dataset_of(((0,), 1, 1)), tmp_path, size=2, target=2)
    assert mapping.selected_token_ids.tolist() == [0, 1]


def test_a_second_call_reads_the_first_ones_file(tmp_path, monkeypatch, caplog):
    dataset = dataset_of(((9,), 9, 90, 80, 70))
    mapping, coverage = build(dataset, tmp_path, size=5)
    monkeypatch.setattr(ChatDataset, "token_counts", None)
    with caplog.at_level(logging.INFO):
        again, coverage_again = build(dataset, tmp_path, size=5)
    assert (again.digest, coverage_again) == (mapping.digest, coverage)
    assert "(5 of 300 tokens) covers 66.67 %" in caplog.text
    assert len(list(tmp_path.iterdir())) == 1


def test_other_data_sizes_and_tokenizers_have_files_of_their_own(tmp_path):
    dataset = dataset_of(((9,), 9, 90, 80, 70))
    build(dataset, tmp_path)
    build(dataset, tmp_path, size=9)
    build(dataset, tmp_path, target=VOCAB_SIZE + 20)
    build(dataset_of(((9,), 9, 90, 80, 71)), tmp_path)
    build(dataset, tmp_path, target=VOCAB_SIZE + 1)
    assert len(list(tmp_path.iterdir())) == 5
    other = make_tiny_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    mapping, _ = build_vocab_mapping(
        dataset, tokenizer=other, target_vocab_size=VOCAB_SIZE + 1, draft_vocab_size=8, cache_dir=tmp_path
    )
    assert int(mapping.selected_token_ids[-1]) == VOCAB_SIZE


@pytest.mark.parametrize(
    "damage", ["cut", "not JSON", "other ids", "ids out of range", "not an object", "a key is gone"]
)
def test_a_damaged_file_is_built_anew(tmp_path, damage, caplog):
    dataset = dataset_of(((9,), 9, 90, 80, 70))
    mapping, _ = build(dataset, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    kept = json.loads(whole)
    ids = kept["selected_token_ids"]
    path.write_text(
        {
            "cut": whole[: len(whole) // 2],
            "not JSON": "\x00" * 50,
            "other ids": json.dumps({**kept, "selected_token_ids": [*ids[:-1], 200]}),
            "ids out of range": json.dumps({**kept, "selected_token_ids": [*ids[:-1], 5000]}),
            "not an object": "[]",
            "a key is gone": json.dumps({"coverage": 1.0}),
        }[damage]
    )
    again, _ = build(dataset, tmp_path)
    assert again.digest == mapping.digest
    assert "damaged and built anew" in caplog.text
    assert path.read_text() == whole


@pytest.mark.parametrize("size", [0, VOCAB_SIZE + 1])
def test_a_size_that_the_target_cannot_fill_is_refused(tmp_path, size):
    with pytest.raises(ConfigError, match=rf"draft\.vocab_size must lie in \[1, 300\] .*, got {size}"):
        build(dataset_of(((9,), 9, 90)), tmp_path, size=size)


def test_a_size_without_room_for_the_special_tokens_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="room for the tokenizer's 3 special tokens, got 2"):
        build(dataset_of(((9,), 9, 90)), tmp_path, size=2)


def test_ids_that_the_target_does_not_know_are_refused(tmp_path):
    with pytest.raises(DataError, match="below the target's vocabulary size 300, got 300"):
        build(dataset_of(((9,), 9, 300)), tmp_path)
