"""The names that overrides may use, and the explanation of an override that Hydra refuses."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

from eagle_rpc.config.checks import as_message
from eagle_rpc.config.schema import Config

# +, ++ or ~ if given, a group or a setting's path, and a value if given. Hydra judges its own settings.
_OVERRIDE = re.compile(r"([+~]*)((?!hydra)[\w./]+)(?:=(.*))?", re.DOTALL)


def groups(conf: Path) -> dict[str, list[str]]:
    """The config groups of a `conf/` directory with their choices."""
    names = sorted(path.name for path in conf.iterdir() if path.is_dir())
    return {name: sorted(path.stem for path in (conf / name).glob("*.yaml")) for name in names}


def settings() -> list[str]:
    """The path `SECTION.FIELD` of every setting."""
    sections = [(section.name, getattr(Config(), section.name)) for section in fields(Config)]
    return [f"{name}.{field.name}" for name, section in sections for field in fields(section)]


def explain(error: Exception, overrides: Sequence[str], conf: Path) -> str:
    """Each unknown name in `overrides` with the nearest known one; if all are known, Hydra's `error`."""
    if mistakes := list(_unknown_names(overrides, groups(conf))):
        return as_message(mistakes)
    cause = error.__cause__ or error
    field = getattr(cause, "full_key", None) or getattr(error, "override", None) or "the configuration"
    return f"{field} cannot be used: {str(getattr(cause, 'msg', None) or cause).splitlines()[0]}"


def _unknown_names(overrides: Sequence[str], choices: dict[str, list[str]]) -> Iterator[str]:
    known = settings()
    sections = {path.split(".")[0] for path in known}
    for override in overrides:
        match = _OVERRIDE.fullmatch(override)
        if match is None:
            continue
        prefix, name, value = match.groups()
        if value is None and prefix != "~":
            yield f"{override} is not an override: write GROUP=CHOICE or SECTION.FIELD=VALUE"
        elif name in choices and re.fullmatch(r"[\w-]+", value or ""):
            if value not in (*choices[name], "null"):
                hint = _nearest(value, choices[name]) or f"; choices: {', '.join(choices[name])}"
                yield f"{name}={value} is not a choice{hint}"
        elif name not in sections and not any(f"{name}.".startswith(f"{path}.") for path in known):
            yield f"{name} is not a setting{_nearest(name, [*known, *choices])}"


def _nearest(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
