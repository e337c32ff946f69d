"""Replaces a file or directory as a whole: readers, even after a kill, see the old or the new content."""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

# The number of the operating system's error in the text of an error of Rust.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# The first bytes of the file that git stores in place of a large one.
_LFS_POINTER = b"version https://git-lfs"


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` after the body; an exception leaves `path` unchanged.

    The new content is on the disk before it gets the name. Processes may replace one file at the same time:
    the last replacement stays. A failed write raises `OSError` with the name of a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        with _named_in_errors(path):
            yield fresh
            flush_to_disk(fresh)
        fresh.replace(path)
    except BaseException:
        # Also after Ctrl-C: nothing half-written stays.
        fresh.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


@contextlib.contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yields a new empty directory, which becomes `path` after the body; `path` may exist already.

    For one writer at a time: unfinished directories of an earlier writer are removed. After an exception
    `path` stays unchanged. A failed write raises `OSError` with the name of a file or directory.
    """
    fresh, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        with _named_in_errors(path):
            yield fresh
            for file in fresh.rglob("*"):
                flush_to_disk(file)
            flush_to_disk(fresh)
    except BaseException:
        # As above.
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    flush_to_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Adds `path` to an `OSError` that names no file, and makes one of a failed write of safetensors."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except SafetensorError as error:
        if (match := _OS_ERROR.search(str(error))) is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the pointer that git leaves in place of a large file that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def replace_link(path: Path, target: str) -> None:
    """Makes `path` a symbolic link to `target`, relative to its directory. For one writer at a time."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(path)
    flush_to_disk(path.parent)


def remove_directory(path: Path) -> None:
    """Removes a directory. Its name goes first, so that it never names half of the content."""
    old = path.with_name(f".{path.name}.old")
    path.rename(old)
    shutil.rmtree(old)


def remove_unfinished(directory: Path) -> None:
    """Removes the leftovers of killed replacements from `directory`. Only for the one writer there."""
    for suffix in ("new", "old"):
        for path in directory.glob(f".*.{suffix}"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def flush_to_disk(path: Path) -> None:
    """Waits until the content of a file, or the names in a directory, are on the disk.

    Without it a rename may reach the disk before the content.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
