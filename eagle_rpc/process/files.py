"""Replacing a file or a directory as a whole: a reader, or the next run after a kill, sees the old one or the new one."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` when the body ends; after an exception `path` stays as it was.

    The new content is on the disk before it takes the name. Several processes may replace the same file at a time: the last
    one counts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        yield fresh
        flush_to_disk(fresh)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


@contextlib.contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yields a new empty directory to fill, which becomes `path` when the body ends; `path` itself may exist already.

    For one writer at a time: what an earlier writer left unfinished is removed. After an exception `path` stays as it was.
    """
    fresh, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for file in fresh.rglob("*"):
            flush_to_disk(file)
        flush_to_disk(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    flush_to_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Removes a directory whose name must not stand for half of its content meanwhile."""
    old = path.with_name(f".{path.name}.old")
    path.rename(old)
    shutil.rmtree(old)


def remove_unfinished(directory: Path) -> None:
    """Clears from `directory` what killed replacements left. Only for whoever is the one writer there."""
    for suffix in ("new", "old"):
        for path in directory.glob(f".*.{suffix}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a directory's names, are on the disk: a rename may otherwise reach it first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
