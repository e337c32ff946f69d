import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_cases import turns, write_lines
from support.tiny_tokenizer import CHATML, make_tiny_tokenizer
from support.workers import forking

from eagle_rpc.config.choices import OnError
from eagle_rpc.config.schema import DataConfig, SourceConfig
from eagle_rpc.data import ChatDataset, ChatTemplate, datasets_of, load_data
from eagle_rpc.data.token_cache import tokenised_source
from eagle_rpc.errors import DataError

TEMPLATE = ChatTemplate(make_tiny_tokenizer())
DROPS_THOUGHTS = CHATML.replace("message['content']", "(message['content'] | trim)")


def write_chats(path: Path, numbers) -> Path:
    return write_lines(path, *({"messages": turns(f"question {n}", f"answer {n}")} for n in numbers))


def load(path: Path, template=TEMPLATE, **settings):
    config = DataConfig(train_path=str(path), **settings)
    return tokenised_source(str(path), template, config, cache_dir=path.parent / "cache")


def samples(source) -> list[tuple[list[int], list[bool]]]:
    dataset = ChatDataset.of_stores([source.store], [1.0], max_length=2048)
    return [(example.input_ids.tolist(), example.loss_mask.tolist()) for example in dataset]


@pytest.fixture
def untouched(monkeypatch):
    """No chat is rendered any more."""

    def forbidden(*_):
        raise AssertionError("tokenised again")

    return lambda: monkeypatch.setattr(ChatTemplate, "samples", forbidden)


def test_a_second_start_renders_nothing_and_reads_the_same(tmp_path, untouched, caplog):
    path = write_chats(tmp_path / "chats.jsonl", range(20))
    first = load(path)
    untouched()
    with caplog.at_level(logging.INFO):
        again = load(path)
    assert samples(again) == samples(first)
    assert again.counts == first.counts and again.store.digest == first.store.digest
    assert "20 chats in 20 samples" in caplog.text


def test_the_same_content_elsewhere_is_found_and_changed_content_is_not(tmp_path, untouched):
    path = write_chats(tmp_path / "chats.jsonl", range(20))
    first = load(path)
    copy = path.rename(tmp_path / "moved.jsonl")
    untouched()
    assert samples(load(copy)) == samples(first)
    status = copy.stat()
    copy.write_text(copy.read_text().replace("question 7", "question 8"))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(AssertionError, match="tokenised again"):
        load(copy)


@pytest.mark.parametrize("change", ["template", "max_length", "on_error"])
def test_all_that_tokens_depend_on_has_a_cache_of_its_own(tmp_path, untouched, change):
    path = write_chats(tmp_path / "chats.jsonl", range(3))
    load(path)
    untouched()
    with pytest.raises(AssertionError, match="tokenised again"):
        if change == "template":
            load(path, ChatTemplate(make_tiny_tokenizer(DROPS_THOUGHTS)))
        else:
            load(path, **{"max_length": 40} if change == "max_length" else {"on_error": OnError.skip})


@pytest.mark.parametrize("name", ["tokens.bin", "first.npy", "facts.json"])
def test_a_damaged_cache_is_made_anew(tmp_path, name, caplog):
    path = write_chats(tmp_path / "chats.jsonl", range(20))
    first = samples(load(path))
    (file,) = (tmp_path / "cache" / "tokens").glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:-7])
    assert samples(load(path)) == first
    assert "is damaged and made anew" in caplog.text


def test_an_error_leaves_no_cache_and_names_the_line(tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", {"messages": turns("hello", "hi")}, {"messages": 3})
    for _ in range(2):
        with pytest.raises(DataError, match=r"chats\.jsonl, line 2: messages must be a list"):
            load(path)
    assert not [entry for entry in (tmp_path / "cache" / "tokens").iterdir() if entry.is_dir()]


def test_the_highest_token_is_refused_with_its_place_before_a_target_is_asked(tmp_path):
    path = write_lines(
        tmp_path / "chats.jsonl", *({"messages": turns("a", text)} for text in ("b", "the sea", "c"))
    )
    source = load(path)
    highest = max(max(ids) for ids, _ in samples(source))
    source.require_ids_below(highest + 1)
    with pytest.raises(
        DataError, match=rf"chats\.jsonl, line 1: token ids must be below .* {highest}, got {highest}"
    ):
        source.require_ids_below(highest)


@pytest.mark.slow
def test_many_processes_make_the_samples_of_one(tmp_path, monkeypatch):
    path = write_chats(tmp_path / "chats.jsonl", range(4500))
    alone = load(path, workers=1)
    for file in (tmp_path / "cache" / "tokens").glob("*/facts.json"):
        file.unlink()
    together = load(path, workers=2)
    assert together.store.digest == alone.store.digest and together.counts == alone.counts
    broken = write_lines(tmp_path / "broken.jsonl", *path.read_bytes().splitlines()[:4300], {"messages": []})
    with pytest.raises(DataError, match=r"broken\.jsonl, line 4301"):
        load(broken, workers=2)


def _load(path: str, numbers: Any) -> None:
    numbers.put(load(Path(path)).store.digest)


def test_processes_that_start_together_tokenise_once(tmp_path):
    path = write_chats(tmp_path / "chats.jsonl", range(200))
    queue = forking.Queue()
    processes = [forking.Process(target=_load, args=(str(path), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    digests = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(digests) == 1
    assert len(list((tmp_path / "cache" / "tokens").glob("*/tokens.bin"))) == 1


def test_weights_say_how_often_an_epoch_has_each_chat(tmp_path):
    first, second = (write_chats(tmp_path / f"{n}.jsonl", range(n, n + 400)) for n in (0, 1000))
    config = DataConfig(
        train_path=str(first), sources=[SourceConfig(path=str(second), weight=2.5)], validation_share=0.0
    )
    train, _ = datasets_of(config, load_data(config, TEMPLATE, cache_dir=tmp_path))
    times = Counter(TEMPLATE.tokenizer.decode(example.input_ids[:-1]).split()[-1] for example in train)
    assert {times[str(n)] for n in range(400)} == {1}
    often = [times[str(n)] for n in range(1000, 1400)]
    assert set(often) == {2, 3} and 140 < often.count(3) < 260
    again, _ = datasets_of(config, load_data(config, TEMPLATE, cache_dir=tmp_path))
    assert again.digest == train.digest


def test_chats_of_several_samples_stay_on_one_side_of_the_split(tmp_path):
    unstable = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ '<|im_start|>gone<|im_end|>' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    path = write_lines(
        tmp_path / "chats.jsonl",
        *({"messages": turns(f"q {n}", f"a {n}", f"again {n}", f"b {n}")} for n in range(40)),
    )
    source = load(path, ChatTemplate(make_tiny_tokenizer(unstable)))
    assert source.counts.chats == 40 and source.counts.samples == 80
    parts = ChatDataset.of_stores([source.store], [1.0], max_length=2048).split(0.3)
    texts = [" ".join(TEMPLATE.tokenizer.decode(example.input_ids) for example in part) for part in parts]
    for number in range(40):
        assert sum(f"q {number}<" in text for text in texts) == 1


def test_facts_are_json(tmp_path):
    path = write_chats(tmp_path / "chats.jsonl", range(3))
    load(path, on_error=OnError.skip)
    (facts,) = (tmp_path / "cache" / "tokens").glob("*/facts.json")
    assert json.loads(facts.read_text())["counts"]["chats"] == 3
