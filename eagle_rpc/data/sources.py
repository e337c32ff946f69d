"""Records of data files: JSON in its usual layouts, compressed or not, parquet, Arrow, and datasets of the hub.

JSON is read here, since the `datasets` library gives the records of a file the same keys and types.
Everything else goes through `datasets`.
"""

import glob
import gzip
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from eagle_rpc.config.schema import DataConfig, SourceConfig
from eagle_rpc.data.problems import RecordProblem
from eagle_rpc.data.records import FORM_KEYS
from eagle_rpc.errors import DataError

# Enough for a chat of a million tokens; a file without line ends cannot fill the memory.
MAX_RECORD_BYTES = 16 * 2**20

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst")
# Files of a directory that describe a dataset instead of holding it.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")
_FOREIGN = {
    b"version https://git-lfs": "a pointer of git-lfs instead of the file: run git lfs pull",
    b"\xff\xfe": "UTF-16 text: iconv -f UTF-16 -t UTF-8 makes UTF-8 of it",
    b"\xfe\xff": "UTF-16 text: iconv -f UTF-16 -t UTF-8 makes UTF-8 of it",
    b"{\x00": "UTF-16 text: iconv -f UTF-16LE -t UTF-8 makes UTF-8 of it",
    b"\x00": "binary data or UTF-16 text, not JSON in UTF-8",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x93NUMPY": "a NumPy array: write records with input_ids and loss_mask",
    b"BZh": "a bzip2 file: unpack it, or compress it with gzip or zstd",
    b"\xfd7zXZ": "an xz file: unpack it, or compress it with gzip or zstd",
}
Record = tuple[str, Any]  # its place, as in "chats.jsonl, line 3", and its value or the `RecordProblem` of it


def read_records(path: str) -> Iterator[Record]:
    """The records of a file, of a directory or pattern of files in the order of their names, or of a dataset.

    A dataset of the hub is `owner/name`, `owner/name:config` or `owner/name@split`, by default the split
    train. Raises `DataError` for a path that names nothing, and for a file that does not hold records.
    """
    location = Path(path).expanduser()
    if location.is_dir() and (
        (location / "state.json").exists() or (location / "dataset_dict.json").exists()
    ):
        yield from _saved_dataset(location)
        return
    for file in data_files(path):
        try:
            yield from _file_records(file)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{file} must be a readable file of chats, got: {reason}") from error
    if not data_files(path):
        yield from _hub_dataset(path)


def data_files(path: str) -> list[Path]:
    """The files of a path, sorted; empty if it names a dataset of the hub. Raises `DataError`."""
    location = Path(path).expanduser()
    if location.is_dir():
        files = [file for file in sorted(location.rglob("*")) if _is_data(file.relative_to(location), file)]
        if not files:
            raise DataError(
                f"{path} must be a directory with files of chats ({', '.join(_SUFFIXES)}), got none"
            )
        return files
    if location.exists():
        return [location]
    found = [Path(name) for name in sorted(glob.glob(str(location), recursive=True)) if Path(name).is_file()]
    if found or (_HUB_NAME.fullmatch(path) and not path.endswith((*_SUFFIXES, *_COMPRESSED))):
        return found
    raise DataError(f"{path} must be a file of chats, a directory or a pattern of files, got: no such file")


def _is_data(inside: Path, file: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in inside.parts)
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    return name.endswith(_SUFFIXES) and name not in _DESCRIPTIONS and not hidden and file.is_file()


def _file_records(file: Path) -> Iterator[Record]:
    with file.open("rb") as raw:
        start = raw.read(64)
        if start.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
            kind = "parquet" if start.startswith(b"PAR1") else "arrow"
            datasets = _library("datasets", f"{file} is a {kind} file")
            yield from _rows(
                file, datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
            )
            return
        raw.seek(0)
        stream: IO[bytes] = raw
        if start.startswith(b"\x1f\x8b"):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw))
        elif start.startswith(b"\x28\xb5\x2f\xfd"):
            zstandard = _library("zstandard", f"{file} is compressed with zstd")
            stream = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))
        yield from _json_records(file, stream)


def _json_records(file: Path, stream: IO[bytes]) -> Iterator[Record]:
    """One record a line; or a list of records, or records over several lines each."""
    lines = _lines(stream)
    head = list(itertools.islice(lines, 1))
    while head and not head[-1].strip():
        head += itertools.islice(lines, 1)
    first = head[-1] if head else b""
    _check_start(file, first)
    second = next(lines, b"")
    lines = itertools.chain(head, [second] if second else [], lines)
    # A broken first line is followed by a record, a record over several lines is not.
    over_lines = not _is_complete(first) and not (second.startswith(b"{") and _is_complete(second))
    if first.lstrip().startswith(b"[") or over_lines:
        for number, value in enumerate(_values(file, lines), start=1):
            yield from ((f"{file}, record {number}", record) for record in _unwrapped(value))
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield from ((f"{file}, line {number}", record) for record in _unwrapped(_parsed(line)))


def _check_start(file: Path, first: bytes) -> None:
    for mark, meaning in _FOREIGN.items():
        if first.startswith(mark):
            raise DataError(f"{file} must hold chats as JSON in UTF-8, it is {meaning}")
    if first.strip() and first.lstrip()[:1] not in b"{[":
        text = first[:40].decode(errors="replace")
        raise DataError(f"{file} must hold chats as JSON, which begins with {{ or [, got {text!r}")


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines without a byte order mark at the beginning; a longer one is cut to just over the limit."""
    mark = b"\xef\xbb\xbf"
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        rest = line
        while len(rest) > MAX_RECORD_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_RECORD_BYTES + 1)
        yield line.removeprefix(mark)
        mark = b"\n\n"  # in no line


def _is_complete(line: bytes) -> bool:
    """Whether a line is JSON, or is wrong before its end; otherwise its record goes on in the next line."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos < len(line.rstrip().decode(errors="replace"))
    except (ValueError, RecursionError):
        return True
    return True


def _parsed(line: bytes) -> Any:
    """The value of a line, or its problem."""
    if len(line) > MAX_RECORD_BYTES:
        return RecordProblem(f"the line must have at most {MAX_RECORD_BYTES} bytes", kind="too long")
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RecordProblem(_not_utf8(error), kind="not UTF-8")
    except (ValueError, RecursionError) as error:
        return RecordProblem(f"the line is not JSON: {error}", kind="not JSON")


def _values(file: Path, lines: Iterator[bytes]) -> Iterator[Any]:
    """The elements of a list, or values one after the other, from text that is read piece by piece."""
    decoder, buffer, wanted, in_list = json.JSONDecoder(), "", 0, False
    while True:
        buffer = buffer.lstrip(" \t\r\n,")
        if buffer.startswith("[") and not in_list:
            buffer, in_list = buffer[1:], True
            continue
        if buffer.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(buffer)
        except ValueError as error:
            pieces = list(itertools.islice(lines, 1)) if len(buffer) <= MAX_RECORD_BYTES else []
            # A value that is wrong before the end of the text does not become right by more of it.
            if not pieces or (isinstance(error, json.JSONDecodeError) and error.pos < wanted):
                if not buffer and not in_list:
                    return
                raise DataError(f"{file} must be whole JSON, got: {error}") from error
            while len(pieces) * 80 < len(buffer) and (more := next(lines, None)):
                pieces.append(more)
            buffer += _decoded(file, b"".join(pieces))
            continue
        yield value
        buffer, wanted = buffer[end:], 0


def _decoded(file: Path, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: {_not_utf8(error)}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"the text is not UTF-8 at byte {error.start} ({error.object[error.start]:#x}): if it is of a Windows "
        "code page, iconv -f WINDOWS-1252 -t UTF-8 makes UTF-8 of it"
    )


def _unwrapped(value: Any) -> list[Any]:
    """The records of an object that holds a list of them under one key, otherwise the value alone."""
    if isinstance(value, dict) and not value.keys() & (FORM_KEYS - {"data"}):
        for inner in value.values():
            if isinstance(inner, list) and inner and all(_is_record(one) for one in inner):
                return inner
    return [value]


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.keys() & FORM_KEYS)


def _saved_dataset(directory: Path) -> Iterator[Record]:
    datasets = _library("datasets", f"{directory} is a saved dataset")
    yield from _rows(directory, _one_split(str(directory), datasets.load_from_disk(str(directory))))


def _hub_dataset(path: str) -> Iterator[Record]:
    match = _HUB_NAME.fullmatch(path)
    assert match is not None
    datasets = _library("datasets", f"{path} is no file and may be a dataset of the hub")
    try:
        found = datasets.load_dataset(match["name"], match["config"], split=match["split"], streaming=True)
    except Exception as error:
        raise DataError(
            f"{path} must be a file, a directory or a dataset of the hub, got: {error}"
        ) from error
    yield from _rows(Path(path), _one_split(path, found))


def _one_split(path: str, found: Any) -> Iterable[Any]:
    if not isinstance(found, dict):
        return found
    if "train" in found or len(found) == 1:
        return found.get("train") or next(iter(found.values()))
    raise DataError(f"{path} must have a split train or one split alone, got {', '.join(sorted(found))}")


def _rows(path: Path, rows: Iterable[Any]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _library(name: str, need: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        raise DataError(f"{need}, which needs the package {name}: pip install 'eagle-rpc[data]'") from error


def training_sources(config: DataConfig) -> list[SourceConfig]:
    """All sources of a run."""
    return [SourceConfig(path=config.train_path), *config.sources]
