"""The log of a worker: each line has time, worker name, level (unless it is info) and message."""

import logging
import sys
from pathlib import Path

from tqdm import tqdm

_PACKAGE = __name__.partition(".")[0]
_MARK = f"{_PACKAGE}.worker"


def setup_logging(worker_name: str, log_file: Path | None = None, level: int | str = logging.INFO) -> None:
    """Sends the log to stderr and, if given, to `log_file`; a second call replaces the first.

    `level` is for this package; other libraries log warnings and errors.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == _MARK]:
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_BesideBars()]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.set_name(_MARK)
        handler.setFormatter(_WorkerFormatter(worker_name))
        root.addHandler(handler)
    logging.getLogger(_PACKAGE).setLevel(level)
    logging.captureWarnings(True)


class _WorkerFormatter(logging.Formatter):
    """Repeats the prefix on every line of a message, so that lines of several workers can be told apart."""

    def __init__(self, worker_name: str) -> None:
        super().__init__()
        self._worker_name = worker_name

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        prefix = f"{self.formatTime(record, '%H:%M:%S')} {self._worker_name} {level}"
        return "\n".join(prefix + line for line in super().format(record).splitlines() or [""])


class _BesideBars(logging.Handler):
    """Writes to stderr above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, ValueError):
            self.handleError(record)
