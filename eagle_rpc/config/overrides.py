"""What is typed as overrides: text is kept from Hydra's grammar, and what Hydra refuses is explained."""

import functools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.types import Quote, QuotedString

from eagle_rpc.config.checks import as_message
from eagle_rpc.config.schema import Config

# +, ++ or ~ if given, a group or a setting's path, and a value if given. Hydra judges its own settings.
_OVERRIDE = re.compile(r"([+~]*)((?!hydra)[\w./]+)(?:=(.*))?", re.DOTALL)
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
# An element of a list: quotes and interpolations may hold commas.
_ELEMENT = re.compile(rf"(?:{_QUOTED}|\$\{{[^}}]*\}}|[^,])+", re.DOTALL)
# The opening mark and key before a value inside lists and dicts, and the value, if it is without quotes.
_INNER_VALUE = re.compile(r"""([\[{,]\s*(?:\w+\s*:\s*)?)([^\s\[\]{}'"][^\[\]{},]*)(?=[,\]}])""")
_PLAIN_WORD = re.compile(r"[\w.+-]+")


def groups(conf: Path) -> dict[str, list[str]]:
    """The config groups of a `conf/` directory with their choices."""
    names = sorted(path.name for path in conf.iterdir() if path.is_dir())
    return {name: sorted(path.stem for path in (conf / name).glob("*.yaml")) for name in names}


def settings() -> list[str]:
    """The path `SECTION.FIELD` of every setting."""
    sections = [(section.name, getattr(Config(), section.name)) for section in fields(Config)]
    return [f"{name}.{field.name}" for name, section in sections for field in fields(section)]


def for_hydra(override: str) -> str:
    """`override` as Hydra has to be told it: text in quotes, and new keys of dicts with `++`.

    Text thus never becomes a number, a truth value or a mistake of grammar, alone or in a list. A value that
    is in quotes already, an interpolation and `null` where the type allows it keep their meaning.
    """
    match = _OVERRIDE.fullmatch(override)
    if match is None or match[3] is None or "~" in match[1]:
        return override
    prefix, name, value = match.groups()
    hints = _hints()
    hint = hints.get(name)
    if any(get_origin(hints.get(path)) is dict for path in (name, ".".join(name.split(".")[:2]))):
        return f"{prefix or '++'}{name}={value}"
    if get_origin(hint) is list and str in get_args(hint):
        if not (value.startswith("[") and value.endswith("]")):
            return override
        elements = [_in_quotes(element.strip()) for element in _ELEMENT.findall(value[1:-1])]
        return f"{prefix}{name}=[{','.join(elements)}]"
    nullable = type(None) in get_args(hint)
    if hint is not str and not (nullable and str in get_args(hint)):
        return override
    if nullable and value.lower() == "null":
        return override
    return f"{prefix}{name}={_in_quotes(value)}"


@functools.cache
def _hints() -> dict[str, Any]:
    """The type of every setting by its path, without rules."""
    return {
        f"{section.name}.{name}": hint
        for section in fields(Config)
        for name, hint in get_type_hints(type(getattr(Config(), section.name))).items()
    }


def _in_quotes(text: str, quote: Quote = Quote.single) -> str:
    return text if re.fullmatch(_QUOTED, text, re.DOTALL) else QuotedString(text, quote).with_quotes()


def explain(error: Exception, overrides: Sequence[str], conf: Path) -> str:
    """Each unknown name in `overrides` with the nearest known one; if all are known, Hydra's `error`."""
    if mistakes := list(_unknown_names(overrides, groups(conf))):
        return as_message(mistakes)
    cause = error.__cause__ or error
    refused = getattr(error, "override", None) or ""
    typed = next((override for override in overrides if for_hydra(override) == refused), refused)
    if (quoted := _with_inner_quotes(typed)) != typed:
        return f"{typed} cannot be read: text inside lists and dicts needs quotes, as {shlex.quote(quoted)}"
    field = getattr(cause, "full_key", None) or typed or "the configuration"
    return f"{field} cannot be used: {str(getattr(cause, 'msg', None) or cause).splitlines()[0]}"


def _with_inner_quotes(override: str) -> str:
    """The override with quotes around each value in its lists and dicts that is more than a word."""

    def quoted(match: re.Match[str]) -> str:
        value = match[2].strip()
        return match[0] if _PLAIN_WORD.fullmatch(value) else match[1] + _in_quotes(value, Quote.double)

    return _INNER_VALUE.sub(quoted, override)


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
