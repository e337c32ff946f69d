"""Worker ids: ascending, and never the same twice, since torch keeps a broken pipe for the id that it once had."""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from eagle_rpc.errors import ConfigError, WaitTimeout

# torch keeps ids as 16 bit integers; every worker numbers its connections with the upper half of them.
LAST_WORKER_ID = 2**14 - 1

_LOCK_SECONDS = 2.0
_LOCK_RETRY_SECONDS = 0.01


class IdFile:
    """Remembers the last id that was handed out. Registries that share the file hand out different ids.

    Workers that wait together get theirs by one write to the disk, of as many ids as there are waiting: a crowd costs a few
    writes, and a registry that dies has wasted no more than the ids of those that waited just then. No wait for a lock is
    longer than `lock_seconds`.
    """

    def __init__(self, path: Path, *, lock_seconds: float = _LOCK_SECONDS) -> None:
        self._path = path
        self._lock_seconds = lock_seconds
        self._counting = threading.Lock()
        self._num_waiting = 0
        self._turn = threading.Lock()
        self._claimed = range(0)  # on the disk, for those that wait

    def last(self) -> int:
        """0 if none was handed out yet. Raises `ConfigError` if the file cannot be read or holds anything else."""
        try:
            value = int(self._path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._unusable(error) from None
        except ValueError:
            raise ConfigError(f"{self._path} must hold the last worker id, it holds something else") from None
        if not 0 <= value <= LAST_WORKER_ID:
            raise ConfigError(f"{self._path} must hold a worker id in 0..{LAST_WORKER_ID}, it holds {value}")
        return value

    def next(self) -> int:
        """A new id, which is on the disk before it is returned.

        Raises `ConfigError` when there are no more, `WaitTimeout` if another registry or the disk keeps it waiting.
        """
        deadline = time.monotonic() + self._lock_seconds
        with self._counted(), self._own_turn(deadline):
            if not self._claimed:
                self._claimed = self._claim(self._num_waiting, deadline)
            value, self._claimed = self._claimed[0], self._claimed[1:]
        return value

    def _claim(self, number: int, deadline: float) -> range:
        """The next `number` ids, or as many as are left, as nobody else's."""
        with self._locked(deadline) as directory:
            first = self.last() + 1
            last = min(first + number - 1, LAST_WORKER_ID)
            if last < first:
                raise ConfigError(
                    f"all worker ids up to {LAST_WORKER_ID} are used: stop every worker and remove {self._path}"
                )
            try:
                self._write(last)
                os.fsync(directory)
            except OSError as error:
                raise self._unusable(error) from None
        return range(first, last + 1)

    def _write(self, value: int) -> None:
        draft = self._path.with_name(f"{self._path.name}.next")
        with draft.open("w", encoding="ascii") as file:
            file.write(f"{value}\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self._path} must be a file that the registry may read and replace: {error.strerror}"
        )

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts the caller among those that wait."""
        with self._counting:
            self._num_waiting += 1
        try:
            yield
        finally:
            with self._counting:
                self._num_waiting -= 1

    @contextlib.contextmanager
    def _own_turn(self, deadline: float) -> Iterator[None]:
        """Lets one thread of this process in at a time, the system's way: without polling."""
        if not self._turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise self._kept_waiting()
        try:
            yield
        finally:
            self._turn.release()

    @contextlib.contextmanager
    def _locked(self, deadline: float) -> Iterator[int]:
        """The directory, locked against other registries: the file itself is replaced."""
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            while True:
                try:
                    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise self._kept_waiting() from None
                    time.sleep(_LOCK_RETRY_SECONDS)
            yield directory
        finally:
            os.close(directory)

    def _kept_waiting(self) -> WaitTimeout:
        return WaitTimeout(f"waited {self._lock_seconds:g} s for the lock of {self._path.parent}")
