"""The log of a worker: lines with time, worker name, level (unless it is info) and message, or JSON objects."""

import contextlib
import datetime
import json
import logging
import re
import sys
from pathlib import Path

from tqdm import tqdm

from eagle_rpc.config.choices import LogFormat

_PACKAGE = __name__.partition(".")[0]
_MARK = f"{_PACKAGE}.worker"
_FILE_ONLY = "file_only"
_PREFIX = re.compile(r"\d\d:\d\d:\d\d \S+ (error: )?")
# To the begin of a terminal's line, and erases it (ECMA-48, CR and EL).
_FRESH_LINE = "\r\x1b[K"


def setup_logging(
    worker_name: str,
    log_file: Path | None = None,
    level: int | str = logging.INFO,
    *,
    log_format: LogFormat = LogFormat.text,
) -> None:
    """Sends the log to stderr and, if given, to `log_file`; a second call replaces the first.

    `level` is for this package; other libraries log warnings and errors.
    """
    formatter = _JsonFormatter if log_format is LogFormat.json else _WorkerFormatter
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == _MARK]:
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_BesideBars()]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.set_name(_MARK)
        handler.setFormatter(formatter(worker_name))
        root.addHandler(handler)
    logging.getLogger(_PACKAGE).setLevel(level)
    logging.captureWarnings(True)


def log_file() -> Path | None:
    """The file that the log goes to; None if there is none, or none yet."""
    files = [handler for handler in logging.getLogger().handlers if isinstance(handler, _LogFile)]
    return Path(files[0].baseFilename) if files else None


def logs_json() -> bool:
    """Whether the log consists of JSON objects."""
    return any(isinstance(handler.formatter, _JsonFormatter) for handler in logging.getLogger().handlers)


def log_last_words(text: str, error: BaseException | None = None) -> None:
    """Logs the end of this process as an error.

    The traceback of `error`, if given, goes to the file only; in JSON it is a field of the last words.
    """
    logger = logging.getLogger(_PACKAGE)
    if error is not None and logs_json():
        logger.error("%s", text, exc_info=error)
        return
    if error is not None:
        logger.error("the traceback:", exc_info=error, extra={_FILE_ONLY: True})
    logger.error("%s", text)


def message_of(line: str) -> str:
    """The message of a line of a log, in either form; another line as it is."""
    try:
        match json.loads(line):
            case {"message": str(message)}:
                return message
    except ValueError:
        pass
    return _PREFIX.sub("", line, count=1)


class _WorkerFormatter(logging.Formatter):
    """Repeats the prefix on every line of a message, so that lines of several workers can be told apart."""

    def __init__(self, worker_name: str) -> None:
        super().__init__()
        self._worker_name = worker_name

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        prefix = f"{self.formatTime(record, '%H:%M:%S')} {self._worker_name} {level}"
        return "\n".join(prefix + line for line in super().format(record).splitlines() or [""])


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC, RFC 3339), `level`, `worker`, `logger`, `message`; `exception`, if any."""

    def __init__(self, worker_name: str) -> None:
        super().__init__()
        self._worker_name = worker_name

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        fields = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "worker": self._worker_name,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


class _BesideBars(logging.Handler):
    """Writes to stderr above the progress bars, on a terminal also above the bar of another worker, which draws it
    anew with its next step."""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, _FILE_ONLY):
            return
        try:
            fresh = _FRESH_LINE if sys.stderr.isatty() else ""
            tqdm.write(fresh + self.format(record), file=sys.stderr)
        except (OSError, ValueError):
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """Says once that the file cannot be written, as on a full disk; the log goes on in the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.filters:
            self.addFilter(lambda _: False)
            said = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
            said["msg"] = f"no longer writing {self.baseFilename}: {sys.exc_info()[1]}"
            tqdm.write(self.format(logging.makeLogRecord(said)), file=sys.stderr)

    def close(self) -> None:
        # Closing tries once more to write what could not be written.
        with contextlib.suppress(OSError):
            super().close()
