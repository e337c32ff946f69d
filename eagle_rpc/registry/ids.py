"""Worker ids: ascending, and never the same twice, since torch keeps a broken pipe for the id that it once had."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from eagle_rpc.errors import ConfigError, WaitTimeout

# torch keeps worker ids as 16 bit integers.
LAST_ID = 2**15 - 1

_LOCK_SECONDS = 2.0
_LOCK_RETRY_SECONDS = 0.01


class IdFile:
    """Remembers the last id that was handed out. Registries that share the file hand out different ids."""

    def __init__(self, path: Path) -> None:
        self._path = path

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
        if not 0 <= value <= LAST_ID:
            raise ConfigError(f"{self._path} must hold a worker id in 0..{LAST_ID}, it holds {value}")
        return value

    def next(self) -> int:
        """A new id, which is on the disk before it is returned. Raises `ConfigError` when there are no more."""
        with self._locked() as directory:
            value = self.last() + 1
            if value > LAST_ID:
                raise ConfigError(f"all worker ids up to {LAST_ID} are used: stop every worker and remove {self._path}")
            try:
                self._write(value)
                os.fsync(directory)
            except OSError as error:
                raise self._unusable(error) from None
        return value

    def _write(self, value: int) -> None:
        draft = self._path.with_name(f"{self._path.name}.next")
        with draft.open("w", encoding="ascii") as file:
            file.write(f"{value}\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self._path} must be a file that the registry may read and replace: {error.strerror}")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The directory, locked: the file itself is replaced. Raises `WaitTimeout` if somebody else keeps the lock."""
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise WaitTimeout(f"waited {_LOCK_SECONDS:g} s for the lock of {self._path.parent}") from None
                    time.sleep(_LOCK_RETRY_SECONDS)
            yield directory
        finally:
            os.close(directory)
