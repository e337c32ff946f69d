import gzip
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from data_cases import FORMS, turns, write_lines
from hypothesis import given
from hypothesis import strategies as st

from eagle_rpc.config.choices import OnError
from eagle_rpc.config.schema import DataConfig, SourceConfig
from eagle_rpc.data import Message, read_chats, read_records, training_sources
from eagle_rpc.data.json_records import json_records
from eagle_rpc.data.problems import RecordProblem
from eagle_rpc.data.sources import data_files
from eagle_rpc.errors import DataError

GOOD = {"messages": turns("hello", "hi")}
HELLO = [Message("user", "hello"), Message("assistant", "hi")]
RECORDS = [{"id": number, **GOOD} for number in range(3)]


def _write(suffix: str, text: Callable[[list[object]], str | bytes]) -> Callable[[Path, list[object]], Path]:
    def write(directory: Path, records: list[object]) -> Path:
        path, content = directory / f"chats.{suffix}", text(records)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def _lines(records: list[object], end: str = "\n") -> str:
    return "".join(json.dumps(record) + end for record in records)


def _zstd(directory: Path, records: list[object]) -> Path:
    path = directory / "chats.jsonl.zst"
    with pytest.importorskip("pyarrow").output_stream(str(path), compression="zstd") as file:
        file.write(_lines(records).encode())
    return path


def _directory(directory: Path, records: list[object]) -> Path:
    (directory / "parts" / ".cache").mkdir(parents=True)
    for number, record in enumerate(records):
        write_lines(directory / "parts" / f"part{number}.jsonl", record)
    write_lines(directory / "parts" / ".cache" / "hidden.jsonl", "{")
    write_lines(directory / "parts" / "README.md", "about the chats")
    return directory / "parts"


def _dataset(records: list[object]):
    return pytest.importorskip("datasets").Dataset.from_list(records)


def _parquet(directory: Path, records: list[object]) -> Path:
    _dataset(records).to_parquet(directory / "chats.parquet")
    return directory / "chats.parquet"


def _saved(directory: Path, records: list[object]) -> Path:
    _dataset(records).save_to_disk(directory / "saved")
    return directory / "saved"


def _saved_splits(directory: Path, records: list[object]) -> Path:
    pytest.importorskip("datasets").DatasetDict(train=_dataset(records)).save_to_disk(directory / "splits")
    return directory / "splits"


def _arrow(directory: Path, records: list[object]) -> Path:
    return next(_saved(directory, records).glob("*.arrow"))


TABLES = {"parquet": _parquet, "a saved dataset": _saved, "a saved split": _saved_splits, "Arrow": _arrow}
CONTAINERS = {
    "JSON lines": _write("jsonl", _lines),
    "lines with CRLF, blank ones and a mark": _write(
        "jsonl", lambda records: "\ufeff\r\n" + _lines(records, "\r\n\r\n")
    ),
    "lines without the last end": _write("jsonl", lambda records: _lines(records).rstrip("\n")),
    "an array in one line": _write("json", json.dumps),
    "a pretty array": _write("json", lambda records: json.dumps(records, indent=2)),
    "an array with a mark": _write("json", lambda records: "\ufeff" + json.dumps(records, indent=1)),
    "a list in an object": _write("json", lambda records: json.dumps({"version": [1], "data": records})),
    "a pretty list in an object": _write(
        "json", lambda records: json.dumps({"data": records, "tags": ["a", "b"]}, indent=2)
    ),
    "pretty objects": _write(
        "json", lambda records: "\n".join(json.dumps(record, indent=2) for record in records)
    ),
    "gzip": _write("jsonl.gz", lambda records: gzip.compress(_lines(records).encode())),
    "a pretty array in gzip": _write(
        "json.gz", lambda records: gzip.compress(json.dumps(records, indent=2).encode())
    ),
    "gzip without its name": _write("jsonl", lambda records: gzip.compress(_lines(records).encode())),
    "zstd": _zstd,
    "a directory": _directory,
    "a pattern": lambda directory, records: _directory(directory, records) / "*.jsonl",
    "a pattern of directories": lambda directory, records: _directory(directory, records).parent / "**",
    **TABLES,
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_from_every_container(tmp_path, form, container):
    path = CONTAINERS[container](tmp_path, [FORMS[form], FORMS[form]])
    assert [chat.messages for chat in read_chats(path, on_error=OnError.fail).chats] == [HELLO, HELLO]


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_keeps_the_order_of_its_records(tmp_path, container):
    records = [record for _, record in read_records(str(CONTAINERS[container](tmp_path, RECORDS)))]
    assert [record["id"] for record in records] == [0, 1, 2]


@pytest.mark.parametrize("container", ["JSON lines", "a pretty array", "a list in an object"])
def test_one_record_alone_is_read(tmp_path, container):
    path = CONTAINERS[container](tmp_path, RECORDS[:1])
    assert len(read_chats(path, on_error=OnError.fail).chats) == 1


def test_an_object_with_turns_is_a_record_and_not_a_list_of_them(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"tools": [{"function": {"name": "now"}}], **GOOD}, indent=2))
    (chat,) = read_chats(path, on_error=OnError.fail).chats
    assert (chat.messages, chat.place) == (HELLO, f"{path}, line 1")


@pytest.mark.parametrize(
    ("container", "unit", "numbers"),
    [
        ("JSON lines", "line", [1, 2, 3]),
        ("lines with CRLF, blank ones and a mark", "line", [2, 4, 6]),
        ("an array in one line", "record", [1, 2, 3]),
        ("a list in an object", "record", [1, 2, 3]),
        ("pretty objects", "line", None),
        ("parquet", "row", [1, 2, 3]),
        ("a saved dataset", "row", [1, 2, 3]),
    ],
)
def test_a_place_names_line_record_or_row(tmp_path, container, unit, numbers):
    path = CONTAINERS[container](tmp_path, RECORDS)
    places = [place for place, _ in read_records(str(path))]
    if numbers is None:
        begins = enumerate(path.read_text().splitlines(), start=1)
        numbers = [number for number, line in begins if line.startswith("{")]
    assert places == [f"{path}, {unit} {number}" for number in numbers]


def test_the_files_of_a_directory_are_named_in_the_order_of_their_names(tmp_path):
    places = [place for place, _ in read_records(str(_directory(tmp_path, RECORDS)))]
    assert [Path(place).name for place in places] == [f"part{number}.jsonl, line 1" for number in range(3)]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    assert len(list(read_records(str(write_lines(tmp_path / "chats[1].jsonl", GOOD))))) == 1


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "chats.jsonl", GOOD)
    assert len(list(read_records("~/chats.jsonl"))) == 1


def test_a_line_over_the_limit_is_refused_and_does_not_shift_the_count(tmp_path, monkeypatch):
    monkeypatch.setattr("eagle_rpc.data.json_records.MAX_LINE_BYTES", 200)
    path = write_lines(tmp_path / "chats.jsonl", {"messages": turns("a" * 1000, "hi")}, GOOD)
    file = read_chats(path, on_error=OnError.skip)
    assert [chat.place for chat in file.chats] == [f"{path}, line 2"]
    assert file.skipped == {"too long": 1}
    with pytest.raises(DataError, match="line 1: the line must have at most 200 bytes"):
        read_chats(path, on_error=OnError.fail)


def test_a_record_over_the_limit_ends_an_array(tmp_path, monkeypatch):
    monkeypatch.setattr("eagle_rpc.data.json_records.MAX_LINE_BYTES", 200)
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([GOOD] * 20 + [{"messages": turns("a" * 1000, "hi")}], indent=0))
    with pytest.raises(
        DataError, match=r"chats\.json must be JSON, got a record of more than 200 characters"
    ):
        list(read_records(str(path)))


# JSON values that a record may hold.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(records=st.lists(st.fixed_dictionaries({"x": JSON}), min_size=1, max_size=6), chunk=st.integers(1, 30))
def test_an_array_read_in_pieces_gives_its_elements(records, chunk):
    for text in (json.dumps(records), json.dumps(records, indent=1, ensure_ascii=False)):
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("eagle_rpc.data.json_records._CHUNK", chunk)
            assert [record for _, record in json_records(lambda raw=raw: io.BytesIO(raw), "x")] == records


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.95])
def test_half_an_array_is_refused_with_its_line(tmp_path, cut):
    whole = json.dumps(RECORDS, indent=2)
    path = tmp_path / "chats.json"
    path.write_text(whole[: int(cut * len(whole))])
    with pytest.raises(DataError, match=r"chats\.json must be JSON, got .*line \d+"):
        list(read_records(str(path)))


def test_a_broken_line_is_a_problem_of_its_record_also_if_it_is_the_first(tmp_path):
    for records in ([GOOD, "{", GOOD], ['{"messages": [', GOOD], ["{} and more", GOOD, GOOD]):
        path = write_lines(tmp_path / "chats.jsonl", *records)
        found = [isinstance(record, RecordProblem) for _, record in read_records(str(path))]
        assert found == [isinstance(record, str) for record in records]


@pytest.mark.parametrize(("text", "encoding"), [("café \u2013 yes", "cp1252"), ("café", "latin-1")])
@pytest.mark.parametrize("container", ["JSON lines", "an array in one line"])
def test_another_encoding_is_named(tmp_path, container, text, encoding):
    path = CONTAINERS[container](tmp_path, [GOOD])
    whole = path.read_text().replace("hello", text)
    path.write_bytes(whole.encode(encoding))
    with pytest.raises(DataError, match=f"not UTF-8 but perhaps {encoding} .* iconv -f {encoding} -t utf-8"):
        read_chats(path, on_error=OnError.fail)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NO_RECORDS = {
    "utf-16": (json.dumps(GOOD).encode("utf-16"), "UTF-16 and must be UTF-8: convert it"),
    "utf-16 without a mark": (json.dumps(GOOD).encode("utf-16-le"), "UTF-16 and must be UTF-8"),
    "a git-lfs pointer": (LFS, "git-lfs pointer .* git lfs pull"),
    "a numpy array": (b"\x93NUMPY\x01\0", "numpy array: write records with input_ids and loss_mask"),
    "an archive": (b"PK\x03\x04\0\0", "zip archive"),
    "a binary file": (b"\x80\x02}q\0.", "binary file"),
    "a CSV table": (b"prompt,answer\nhello,hi\n", "CSV table"),
    "a text": (b"hello\nhi\n", "plain text"),
    "an empty file": (b"", "empty"),
    "blank lines": (b"\n \n", "empty"),
}


@pytest.mark.parametrize(("content", "message"), NO_RECORDS.values(), ids=NO_RECORDS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_file_without_records_is_refused_with_what_it_is(tmp_path, content, message, packed):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=rf"chats\.jsonl must hold records, but it is .*{message}"):
        list(read_records(str(path)))


@pytest.mark.parametrize("container", ["gzip", "zstd", "parquet", "Arrow"])
def test_half_a_file_is_refused(tmp_path, container):
    path = CONTAINERS[container](tmp_path, [{**GOOD, "id": os.urandom(9).hex()} for _ in range(2000)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"chats\.jsonl\.|chats\.parquet|\.arrow"):
        list(read_records(str(path)))


def test_a_directory_must_hold_files_of_one_kind(tmp_path):
    with pytest.raises(DataError, match=r"must hold files of records .* got none"):
        list(read_records(str(tmp_path)))
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"must hold files of records .* got table\.csv"):
        list(read_records(str(tmp_path)))
    write_lines(tmp_path / "chats.jsonl", GOOD)
    with pytest.raises(DataError, match=r"got also table\.csv: name the files by a pattern, as .*/\*\.jsonl"):
        list(read_records(str(tmp_path)))


def test_several_splits_are_refused_by_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {"train": _dataset(RECORDS), "test": _dataset(RECORDS)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="must hold the split train alone, got train, test: name one"):
        list(read_records(str(tmp_path / "splits")))
    assert len(list(read_records(str(tmp_path / "splits" / "test")))) == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.jsonl", "must be an existing file or directory, got none"),
        ("data/absent.jsonl", "must be an existing file or directory, got none"),
        ("here/absent", "must be an existing file or directory, got none"),
        ("./*.absent", "must be a pattern that matches files, got none"),
        (" ", "must not be empty"),
    ],
)
def test_an_absent_source_is_named(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(DataError, match=message):
        list(read_records(path))


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/chats", ("owner/chats", None, "train")),
        ("owner/chats:small", ("owner/chats", "small", "train")),
        ("owner/chats@train_sft", ("owner/chats", None, "train_sft")),
        ("owner/chats:small@test", ("owner/chats", "small", "test")),
    ],
)
def test_a_name_of_the_hub_has_configuration_and_split(monkeypatch, name, asked):
    datasets = pytest.importorskip("datasets")
    called = []

    def load_dataset(path, config, *, split):
        called.append((path, config, split))
        return _dataset(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [place for place, _ in read_records(name)] == [f"{name}, row {number}" for number in (1, 2, 3)]
    assert called == [asked]


def test_a_name_that_neither_disk_nor_hub_knows_is_refused(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(path, config, *, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/chats must be a file, .* the hub answers: no network"):
        list(read_records("owner/chats"))


@pytest.mark.parametrize(
    ("content", "package"),
    [(b"PAR1", "datasets"), (b"\xff\xff\xff\xff", "datasets"), (b"\x28\xb5\x2f\xfd", "pyarrow")],
)
def test_an_absent_package_is_named_with_its_command(tmp_path, monkeypatch, content, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "chats").write_bytes(content)
    with pytest.raises(DataError, match=r"pip install 'eagle-rpc\[data\]'"):
        list(read_records(str(tmp_path / "chats")))


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_files_of_a_source_are_those_that_hold_its_records(tmp_path, container):
    path = CONTAINERS[container](tmp_path, RECORDS)
    files = data_files(str(path))
    assert files == sorted(files) and all(file.suffix != ".md" and file.is_file() for file in files)
    assert sum(len(list(read_records(str(file)))) for file in files) == len(RECORDS)


def test_a_dataset_of_the_hub_has_no_files_here():
    assert data_files("owner/chats:small@test") == []


def test_the_path_to_train_on_is_the_first_source():
    other = SourceConfig(path="b", weight=0.5)
    assert training_sources(DataConfig(train_path="a", sources=[other])) == [SourceConfig(path="a"), other]
    assert training_sources(DataConfig(sources=[other])) == [other]
