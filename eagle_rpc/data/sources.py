"""Sources of records: files of several formats, directories and patterns of files, datasets of the hub.

The content of a file tells its format, not its name.
"""

import glob
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, cast

from eagle_rpc.config.schema import DataConfig, SourceConfig
from eagle_rpc.data.json_records import json_records
from eagle_rpc.data.problems import Record
from eagle_rpc.data.tables import (
    INSTALL,
    arrow_rows,
    hub_rows,
    is_hub_name,
    is_saved_dataset,
    parquet_rows,
    saved_rows,
)
from eagle_rpc.errors import DataError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PARQUET = b"PAR1"
_ARROW = (b"\xff\xff\xff\xff", b"ARROW1")
_UTF16 = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"[\0", b"\0{", b"\0[")
# Beginnings of files that hold no records, what they are, and the way out.
_OTHERS = (
    (b"version https://git-lfs", "a git-lfs pointer in place of the file: fetch it with git lfs pull"),
    (b"\x93NUMPY", "a numpy array: write records with input_ids and loss_mask"),
    (b"PK\x03\x04", "a zip archive (perhaps of numpy arrays or of torch): unpack it, or write records"),
    (b"BZh", "compressed with bzip2: unpack it, or compress it with gzip or zstd"),
    (b"\xfd7zXZ", "compressed with xz: unpack it, or compress it with gzip or zstd"),
)
_HEAD_BYTES = 2**16
_KINDS = {"jsonl": "JSON", "ndjson": "JSON", "json": "JSON", "parquet": "parquet", "arrow": "Arrow"}
_COMPRESSIONS = (".gz", ".zst", ".zstd")
_ABOUT_THE_DATA = ("readme", "license", "notice", "dataset_infos.json")  # beginnings of names


def training_sources(config: DataConfig) -> list[SourceConfig]:
    """`data.train_path`, if it is given, and `data.sources`."""
    own = [] if config.train_path is None else [SourceConfig(path=config.train_path)]
    return own + config.sources


def read_records(path: str) -> Iterator[Record]:
    """The records of a source, one after the other; those of several files in the order of the names.

    `path` is a file, a directory, a pattern of files, or a name of the hub (`owner/name:config@split`); `~`
    is the home directory. A record that cannot be decoded comes as a `RecordProblem`. Raises `DataError`,
    which says what the source is and what to do, for all that does not hold records.
    """
    with _readable(path) as location:
        if location is None:
            yield from hub_rows(path)
            return
        for file in _files(location):
            yield from saved_rows(file) if file.is_dir() else _file_records(file)


def data_files(path: str) -> list[Path]:
    """The files that the records of a source are in, sorted; none for a dataset of the hub.

    Raises `DataError` for a path that names nothing.
    """
    with _readable(path) as location:
        files = [] if location is None else _files(location)
        return [
            part for file in files for part in (sorted(file.rglob("*.arrow")) if file.is_dir() else [file])
        ]


@contextmanager
def _readable(path: str) -> Iterator[Path | None]:
    """The path on this machine, None for a name of the hub. Turns an `OSError` of the body into `DataError`."""
    if not path.strip():
        raise DataError(f"the path of a source must not be empty, got {path!r}")
    location = Path(os.path.expanduser(path))
    try:
        yield None if _may_be_on_the_hub(location) else location
    except OSError as error:
        raise DataError(f"{path} must be readable, got: {error.strerror or error}") from error


def _may_be_on_the_hub(path: Path) -> bool:
    """Whether a path is a name of the hub and not a mistake in the name of a file."""
    is_file_name = path.exists() or path.parent.exists() or _kind(path) is not None
    return is_hub_name(str(path)) and not is_file_name


def _files(path: Path) -> list[Path]:
    """Files and saved datasets of a path."""
    if path.is_file() or is_saved_dataset(path):
        return [path]
    if path.is_dir():
        return _files_of_directory(path)
    if os.path.lexists(path):
        raise DataError(f"{path} must be a file or a directory, got something else or a broken link")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    saved = [match for match in matches if is_saved_dataset(match)]
    files = [
        match
        for match in matches
        if match in saved
        or (match.is_file() and not _is_about_the_data(match) and not set(saved) & set(match.parents))
    ]
    if not files:
        kind = (
            "a pattern that matches files" if glob.has_magic(str(path)) else "an existing file or directory"
        )
        raise DataError(f"{path} must be {kind}, got none")
    return files


def _files_of_directory(path: Path) -> list[Path]:
    """The data files below a directory. Raises `DataError` if there are none, or several kinds."""
    visible = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    files = [file for file in visible if not _is_about_the_data(file)]
    others = [file for file in files if _kind(file) is None]
    kinds = sorted({kind for file in files if (kind := _kind(file)) is not None})
    if not kinds:
        found = f", got {others[0].name}" if others else ", got none"
        raise DataError(f"{path} must hold files of records (JSON, parquet or Arrow){found}")
    if others or len(kinds) > 1:
        found = others[0].name if others else " and ".join(kinds)
        raise DataError(
            f"{path} must hold files of records of one kind, got also {found}: "
            f"name the files by a pattern, as {path}/*{next(f for f in files if _kind(f)).suffix}"
        )
    return files


def _kind(file: Path) -> str | None:
    name = file.name.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return _KINDS.get(name.rpartition(".")[2])


def _is_about_the_data(file: Path) -> bool:
    return file.name.lower().startswith(_ABOUT_THE_DATA) or file.suffix.lower() == ".md"


def _file_records(path: Path) -> Iterator[Record]:
    try:
        with _opened(path) as file:
            head = file.read(_HEAD_BYTES)
        if head.startswith(_PARQUET):
            yield from parquet_rows(path)
        elif head.startswith(_ARROW):
            yield from arrow_rows(path)
        else:
            if fault := _fault(head, path):
                raise DataError(f"{path} must hold records, but it is {fault}")
            yield from json_records(partial(_opened, path), str(path))
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or not whole: {error}") from error
    except OSError as error:
        raise DataError(f"{path} must be a readable file, got: {error.strerror or error}") from error


def _opened(path: Path) -> BinaryIO:
    """The content of a file, decompressed."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_GZIP):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if start != _ZSTD:
        return path.open("rb")
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{path} is compressed with zstd, which needs another package: {INSTALL}") from error
    # Unlike the package zstandard, pyarrow notices an end that is missing.
    return BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _fault(head: bytes, path: Path) -> str | None:
    """What a file is that holds no JSON, and what to do about it; None if it may hold JSON."""
    for beginning, fault in _OTHERS:
        if head.startswith(beginning):
            return fault
    if head.startswith(_UTF16):
        return "text in UTF-16 and must be UTF-8: convert it, as with iconv -f utf-16 -t utf-8"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if b"\0" in head:
        return "a binary file: write records as JSON lines or parquet"
    lines = head.removeprefix(b"\xef\xbb\xbf").splitlines()
    if not any(line.strip() for line in lines):
        return "empty" if len(head) < _HEAD_BYTES else None
    if any(line.lstrip().startswith((b"{", b"[")) for line in lines):
        return None
    if path.suffix.lower() in (".csv", ".tsv") or b"," in lines[0] or b"\t" in lines[0]:
        return "perhaps a CSV table, which has no turns: convert it to JSON lines"
    return "plain text: write records as JSON lines or parquet, with messages"
