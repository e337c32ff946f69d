"""One copy a host of tensors that all trainers read: fetched by one trainer, mapped into memory by all.

A directory `KEY` below the user's own one holds `tensors.safetensors` and `lock`. Who maps the tensors holds the
lock shared, by `flock`, which ends with its process; who alone holds it may write or remove the directory. So the
last trainer removes the copy, and the next trainer of any run removes the copies of trainers that were killed.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle_rpc.process.files import replaced_file
from eagle_rpc.process.waiting import BoundedWait

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

_LOCK, _TENSORS = "lock", "tensors.safetensors"
_LOOK_SECONDS = 0.05


class HostCopies:
    """The copies that this process has in use.

    A mapping is private: what this process writes to a tensor changes its own pages only.
    """

    def __init__(self, directory: Path | None, *, patience: float, stop: threading.Event) -> None:
        """`directory`: of memory, such as /dev/shm; None: each process fetches and holds its own tensors.

        `patience`: seconds that another process has to fetch; `stop`: once set, waiting ends.
        """
        self._parent, self._patience, self._stop = directory, patience, stop
        self._held: list[tuple[Path, int]] = []  # directories of copies, and the descriptors of their locks

    def take(self, what: str, identity: Sequence[object], fetch: Callable[[], Tensors]) -> Tensors:
        """The CPU tensors that `fetch` gives to one process of this host; those of equal `identity` are equal.

        `what` is for log and waits. Where the directory has no room, or another process takes too long, this
        process fetches for itself alone. Raises what `fetch` raises.
        """
        if self._parent is None:
            return fetch()
        key = hashlib.sha256(repr(tuple(identity)).encode()).hexdigest()[:24]
        wait = BoundedWait(f"another trainer of this host to fetch {what}", self._patience)
        while not (wait.over or self._stop.is_set()):
            try:
                # Each time: a trainer that leaves removes it when it is empty.
                root = _own_directory(self._parent)
            except OSError as error:
                logger.warning("this trainer keeps its own copy of %s (run.shared_dir): %s", what, error)
                return fetch()
            _remove_unused(root, but=key)
            found = self._map_or_make(root / key, what, fetch)
            if found is not None:
                return found
            wait.say()
            self._stop.wait(_LOOK_SECONDS)
        logger.warning("%s; this trainer fetches for itself", wait.timeout())
        return fetch()

    def _map_or_make(self, copy: Path, what: str, fetch: Callable[[], Tensors]) -> Tensors | None:
        """None while another process writes or removes the copy."""
        file = copy / _TENSORS
        lock = _locked(copy, fcntl.LOCK_SH if file.exists() else fcntl.LOCK_EX)
        if lock is None:
            return None
        if not file.exists():
            try:
                fetched = fetch()
                fault = _store(file, fetched)
            except BaseException:
                _remove(copy, lock)
                raise
            if fault is not None:
                logger.warning("%s is not shared (run.shared_dir): %s", what, fault)
                _remove(copy, lock)
                return fetched
            del fetched
            logger.info("the trainers of this host share %s in %s", what, copy)
            # The change of a lock lets others in between; then the file is gone.
            fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            tensors = load_file(file)
        except FileNotFoundError:
            os.close(lock)
            return None
        self._held.append((copy, lock))
        return tensors

    def release(self) -> None:
        """Gives all copies up; the last process removes them. Tensors that are mapped stay valid."""
        for copy, lock in self._held:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
            else:
                _remove(copy, lock)
        self._held.clear()


def _own_directory(parent: Path) -> Path:
    """Raises `OSError` if another user could read or change what is in it."""
    root = parent / f"eagle_rpc-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    status = root.lstat()
    if root.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{root} must be a directory that this user alone may use")
    return root


def _locked(copy: Path, kind: int) -> int | None:
    """The descriptor of the lock, held; None if others hold it or the copy was removed meanwhile."""
    path = copy / _LOCK
    try:
        copy.mkdir(exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == path.stat().st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _store(file: Path, tensors: Tensors) -> OSError | None:
    """The error if they cannot be written."""
    try:
        with replaced_file(file) as fresh:
            save_file(tensors, fresh)
    except OSError as error:
        return error
    return None


def _remove(copy: Path, lock: int) -> None:
    """Removes a copy whose lock this process alone holds; the lock goes last, so that nobody comes between."""
    with contextlib.suppress(FileNotFoundError):
        for file in copy.iterdir():
            if file.name != _LOCK:
                file.unlink(missing_ok=True)
        (copy / _LOCK).unlink()
    os.close(lock)
    # Another process may have begun a new copy.
    with contextlib.suppress(OSError):
        copy.rmdir()
        copy.parent.rmdir()


def _directories(root: Path) -> list[Path]:
    try:
        return list(root.iterdir())
    except FileNotFoundError:
        return []


def _remove_unused(root: Path, *, but: str) -> None:
    """Removes the copies that no living process maps."""
    for copy in _directories(root):
        if copy.name != but and (lock := _locked(copy, fcntl.LOCK_EX)) is not None:
            logger.info("%s is removed: its trainers were killed", copy)
            _remove(copy, lock)
