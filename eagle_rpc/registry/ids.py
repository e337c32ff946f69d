"""Worker ids: ascending and never used twice, since torch keeps a broken connection for its id."""

import threading
import time
from pathlib import Path

import filelock

from eagle_rpc.errors import ConfigError, WaitTimeout
from eagle_rpc.process.files import replaced_file

# torch keeps ids as 16 bit integers; each worker numbers its connections with the upper half.
LAST_WORKER_ID = 2**14 - 1

_LOCK_SECONDS = 2.0


class IdFile:
    """Numbers workers; the file keeps the last id. Registries that share the file give different ids.

    Threads that wait together get their ids with one write to the disk. A registry that dies then wastes
    these ids only. `lock_seconds` bounds each wait for the disk and for other registries.
    """

    def __init__(self, path: Path, *, lock_seconds: float = _LOCK_SECONDS) -> None:
        self._path = path
        self._lock_seconds = lock_seconds
        self._counting = threading.Lock()
        self._num_waiting = 0
        self._turn = threading.Lock()
        self._claimed = range(0)  # on the disk already, for the threads that wait

    def last(self) -> int:
        """The last id, 0 if there is none. Raises `ConfigError` if the file holds anything else."""
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
        """A new id; the disk has it before the caller.

        Raises `ConfigError` if all are used or the file is unusable, `WaitTimeout` if a lock is not free in
        time.
        """
        deadline = time.monotonic() + self._lock_seconds
        with self._counting:
            self._num_waiting += 1
        try:
            if not self._turn.acquire(timeout=self._lock_seconds):
                raise self._not_free()
            try:
                if not self._claimed:
                    self._claimed = self._claim(self._num_waiting, deadline)
                value, self._claimed = self._claimed[0], self._claimed[1:]
                return value
            finally:
                self._turn.release()
        finally:
            with self._counting:
                self._num_waiting -= 1

    def _claim(self, number: int, deadline: float) -> range:
        """The next `number` ids, or as many as are left, once the disk has the last of them."""
        others = filelock.FileLock(f"{self._path}.lock", timeout=max(0.0, deadline - time.monotonic()))
        try:
            with others, replaced_file(self._path) as fresh:
                first = self.last() + 1
                last = min(first + number - 1, LAST_WORKER_ID)
                if last < first:
                    rule = f"all worker ids up to {LAST_WORKER_ID} are used"
                    raise ConfigError(f"{rule}: stop every worker and remove {self._path}")
                fresh.write_text(f"{last}\n", encoding="ascii")
        except filelock.Timeout:
            raise self._not_free() from None
        except OSError as error:
            raise self._unusable(error) from None
        return range(first, last + 1)

    def _not_free(self) -> WaitTimeout:
        return WaitTimeout(f"waited {self._lock_seconds:g} s for the lock of {self._path}")

    def _unusable(self, error: OSError) -> ConfigError:
        rule = "must be a file that the registry may read and replace"
        return ConfigError(f"{self._path} {rule}: {error.strerror or error}")
