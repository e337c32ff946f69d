"""Rows of parquet and Arrow files, of saved datasets and of the Hugging Face hub, through `datasets`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle_rpc.data.problems import Record
from eagle_rpc.errors import DataError

INSTALL = "pip install 'eagle-rpc[data]'"
_ROWS = 256  # that are Python objects at a time
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the directory."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def is_hub_name(path: str) -> bool:
    """Whether the text has the form `owner/name`, `owner/name:config` or either with `@split`."""
    return _HUB_NAME.fullmatch(path) is not None


def parquet_rows(path: Path) -> Iterator[Record]:
    """Raises `DataError` for a damaged file."""
    datasets = _datasets(str(path))
    try:
        files = [str(path)]
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        yield from _numbered(rows, str(path))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{path} must be a whole parquet file, got: {error}") from error


def arrow_rows(path: Path) -> Iterator[Record]:
    """Raises `DataError` for a damaged file."""
    datasets = _datasets(str(path))
    try:
        yield from _numbered(datasets.Dataset.from_file(str(path)), str(path))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{path} must be a whole Arrow file, got: {error}") from error


def saved_rows(path: Path) -> Iterator[Record]:
    """Raises `DataError` for a directory that is not whole, and for several splits."""
    datasets = _datasets(str(path))
    try:
        saved = datasets.load_from_disk(str(path))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} must be a whole saved dataset, got: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if set(saved) != {"train"}:
            splits = ", ".join(saved)
            raise DataError(
                f"{path} must hold the split train alone, got {splits}: name one, as {path}/{next(iter(saved))}"
            )
        saved = saved["train"]
    yield from _numbered(saved, str(path))


def hub_rows(path: str) -> Iterator[Record]:
    """Rows of a dataset of the hub, of its split `train` unless another is named. Raises `DataError`."""
    match = _HUB_NAME.fullmatch(path)
    assert match is not None
    absent = f"{path} must be a file, a directory, a pattern or a dataset of the Hugging Face hub"
    datasets = _datasets(f"{absent}; no file has this name, and the hub")
    try:
        rows = datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{absent}; no file has this name, and the hub answers: {error}") from error
    yield from _numbered(rows, path)


def _numbered(rows: Any, name: str) -> Iterator[Record]:
    number = 0
    for table in rows.with_format("arrow").iter(batch_size=_ROWS):
        for row in table.to_pylist():
            number += 1
            yield f"{name}, row {number}", row


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name} needs the package datasets: {INSTALL}") from error
    return datasets
