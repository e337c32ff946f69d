"""The files of a run that its report is made of; each may be absent."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagle_rpc.errors import DataError
from eagle_rpc.report.metrics_log import read_metrics

# Earlier runs that are shown beside this one: the newest.
_MOST_EARLIER = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What the files say."""

    name: str
    config: str = ""  # the YAML text
    metrics: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    comparison: dict[str, Any] | None = None
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Evaluations of other runs beside this one, over the same prompts with as many guesses, by run."""
    compared: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The metrics of the runs of compared drafts, by the draft's directory."""

    @property
    def is_empty(self) -> bool:
        return not (self.metrics or self.training or self.evaluation or self.comparison)


def read_sources(
    *, name: str, config: Path, metrics: Path, training: Path, evaluation: Path, comparison: Path
) -> Sources:
    """Reads what is there. Raises `DataError` for a file that is no JSON object."""
    own = _object(evaluation)
    compared = _object(comparison)
    directories = [one["directory"] for one in compared["drafts"]] if compared else []
    return Sources(
        name=name,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        metrics=_lines(metrics),
        training=_object(training),
        evaluation=own,
        comparison=compared,
        earlier=_earlier(own, evaluation) if own else {},
        compared={
            path: lines
            for path in directories
            if (lines := _lines(Path(path).expanduser().parent / metrics.name))
        },
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return list(read_metrics(path)) if path.is_file() else []


def _object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _earlier(own: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Those of other runs in the same directory of runs that answered the same prompts."""
    found = dict[str, dict[str, Any]]()
    others = [one for one in path.parent.parent.glob(f"*/{path.name}") if one.parent != path.parent]
    for other in sorted(others, key=lambda one: -one.stat().st_mtime):
        content = _object(other)
        if content and _asked(content) == _asked(own) and len(found) < _MOST_EARLIER:
            found[other.parent.name] = content
    return found


def _asked(evaluation: dict[str, Any]) -> tuple[list[str], int, float]:
    """Prompts, guesses of a draft and temperature."""
    settings = evaluation["settings"]
    prompts = [one["prompt"] for one in evaluation["prompts"]]
    return prompts, settings["num_draft_tokens"], settings.get("temperature", 0.0)
