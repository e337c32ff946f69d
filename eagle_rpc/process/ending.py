"""The end of a process with an error: one paragraph in the terminal, in the log and for torchrun.

torchrun gives each worker the name of a file; it shows the content of the first one in its report, and
`eagle_rpc.process.launcher` shows nothing else.
"""

import errno
import json
import os
import shutil
import time
import traceback
from pathlib import Path
from typing import NoReturn

from eagle_rpc.config.rules import Setting, settings_of
from eagle_rpc.config.schema import Config
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.process.environment import error_file, speaks_for_host
from eagle_rpc.process.logs import log_file, log_last_words, logs_json

_FULL = (errno.ENOSPC, errno.EDQUOT)
# A disk with less than this counts as full.
_FREE_BYTES = 2**20


def end_with(error: Exception, config: Config | None = None) -> NoReturn:
    """Says why this process ends, and ends it with code 1. `config` is that of its job, if it is known.

    Errors of files and mistakes in this program leave their traceback in the log file.
    """
    text, log = in_words(error, config), log_file()
    _tell_torchrun(text)
    if log is not None:
        log_last_words(text, None if isinstance(error, EagleRpcError) else error)
    # Before a worker has a log, all workers of a host meet the same mistake: one of them says it.
    elif speaks_for_host():
        mistake = not isinstance(error, (EagleRpcError, OSError))
        if mistake and not logs_json():
            traceback.print_exception(error)
        log_last_words(text, error if mistake and logs_json() else None)
    raise SystemExit(1)


def in_words(error: Exception, config: Config | None = None) -> str:
    """The error as one paragraph: its kind, then field or file, rule and value."""
    if isinstance(error, EagleRpcError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {_about_file(error, config)}"
    log = log_file()
    where = f"the traceback is {f'in {log}' if log else 'beside it' if logs_json() else 'above'}"
    message = " ".join(str(error).split())
    return f"a mistake in this program, not in its input: {type(error).__name__}: {message} ({where})"


def _about_file(error: OSError, config: Config | None) -> str:
    """The setting that names the file of an error, or what encloses it, with the file and the reason."""
    reason = error.strerror or str(error)
    paths = [] if config is None else [setting for setting in settings_of(config) if setting.is_path]
    if error.filename is None:
        # A write to an open file tells the reason only.
        paths = [setting for setting in paths if error.errno in _FULL and _is_full(Path(setting.value))][:1]
        file = paths[0].value if paths else "a file"
    else:
        file = os.fsdecode(error.filename)
        paths = _enclosing(paths, file)
    rule = "have room on its disk" if error.errno in _FULL else "be usable"
    if not paths:
        return f"{file} must {rule}: {reason}"
    names, place = " and ".join(setting.path for setting in paths), paths[0].value
    beside = "" if Path(place) == Path(file) else f" ({file})"
    return f"{names} must {rule}, got {place}: {reason}{beside}"


def _enclosing(paths: list[Setting], file: str) -> list[Setting]:
    """The settings, several of one value, whose path is nearest above `file`, or is `file`."""
    for place in (Path(file).absolute(), *Path(file).absolute().parents):
        if found := [setting for setting in paths if Path(setting.value).absolute() == place]:
            return found
    return []


def _is_full(path: Path) -> bool:
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free < _FREE_BYTES


def _tell_torchrun(text: str) -> None:
    """Writes the file that torchrun reads, in the form of torch's own error handler."""
    if (path := error_file()) is None:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    content = {"message": {"message": text, "extraInfo": extra}, "seconds": time.time()}
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        log_last_words(f"torchrun cannot be told the reason: {error}")
