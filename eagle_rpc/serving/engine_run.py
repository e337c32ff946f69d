"""A serving engine that decodes with an export, in a process of its own and, if need be, its own environment."""

import importlib.util
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eagle_rpc.errors import ConfigError, TargetFailed
from eagle_rpc.process.children import last_lines, run_child
from eagle_rpc.serving import engine_side
from eagle_rpc.serving.engine_side import DecodingOutcome, DecodingWork
from eagle_rpc.serving.plain_config import AUX_LAYERS


def engine_python(engine: str, setting: str | None) -> str | None:
    """The Python with this engine: the one that is set, or this one if the engine is installed here; else null.

    Raises `ConfigError` if the one that is set cannot be run.
    """
    if setting is None:
        return sys.executable if importlib.util.find_spec(engine) is not None else None
    found = shutil.which(setting)
    if found is None:
        raise ConfigError(f"serve_check.{engine}_python must be a Python that can be run, got {setting}")
    return found


def decode_in_engine(
    python: str, work: DecodingWork, *, log: Path, seconds: float, stop: threading.Event
) -> DecodingOutcome:
    """What the engine decodes; its own output goes to the end of `log`.

    Raises `TargetFailed` with the end of the log if the engine fails, `WaitTimeout` after `seconds`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "work.json"), Path(scratch, "outcome.json")
        asked.write_text(json.dumps(asdict(work)))
        command = [python, str(Path(engine_side.__file__)), str(asked), str(answered)]
        code = run_child(command, f"{work.engine} to decode", log=log, seconds=seconds, stop=stop)
        if code or not answered.is_file():
            raise TargetFailed(f"{work.engine} ended with code {code}, see {log}:\n{last_lines(log)}")
        return DecodingOutcome(**json.loads(answered.read_text()))


@contextmanager
def shifted_layers(draft: Path, num_target_layers: int) -> Iterator[Path]:
    """A copy of an export, either form, that names the neighbours of the captured layers while the body runs.

    A control: an engine that decodes with it reads other states than the draft was trained with. Raises
    `ConfigError` if the export captures the first and the last layer, which have no common neighbours.
    """
    config: dict[str, Any] = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    before_layer: list[int] = config[AUX_LAYERS]
    shift = 1 if before_layer[-1] < num_target_layers else -1
    if before_layer[0] + shift < 1:
        raise ConfigError(
            "serve_check.control must be false for a draft that captures the first and the last layer, got true"
        )
    config[AUX_LAYERS] = [layer + shift for layer in before_layer]
    if "eagle_config" in config:
        config["eagle_config"][AUX_LAYERS] = [layer + shift - 1 for layer in before_layer]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "shifted")
        shutil.copytree(draft, copy)
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield copy
