"""Makes the reference page of all settings: `python docs/generate.py > docs/configuration.md`."""

import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from eagle_rpc.config.attributes import attribute_docs
from eagle_rpc.config.rules import rule_of
from eagle_rpc.config.schema import Config

_HEAD = """\
# Configuration

`python docs/generate.py > docs/configuration.md` makes this page from `eagle_rpc/config/sections/`.

A setting is written `SECTION.FIELD=VALUE` on the command line, a choice of a group `GROUP=CHOICE`.
Later values win: defaults of this page, files of `conf/`, the command line. `eagle-rpc --help` lists
groups and jobs; with `--cfg job` it prints the composed configuration. Mistakes end a job at once.

Text is taken as it is typed: `run.name=1e10` is no number, and paths may hold blanks, brackets or `=`. Only
inside dicts does text with such characters need quotes: `'data.sources=[{path: "a b.jsonl"}]'`. `~` at the
start of a path is the home directory. Commas and blanks around an element of a list of texts separate it.
"""


def reference() -> str:
    """The page in Markdown: for each section a table of settings and one of the meanings of choices."""
    return "\n".join(
        [_HEAD, *(text for section in fields(Config) for text in _sections(section.name, section.type))]
    )


def _sections(name: str, section: Any) -> Iterator[str]:
    """A section, then the sections inside it."""
    yield _section(name, section)
    for field_name, hint in get_type_hints(section).items():
        if is_dataclass(hint):
            yield from _sections(f"{name}.{field_name}", hint)


def _section(name: str, section: Any) -> str:
    hints, meanings = get_type_hints(section, include_extras=True), attribute_docs(section)
    rows, choices = [], []
    for field in fields(section):
        if is_dataclass(hints[field.name]):
            continue
        hint, rule = hints[field.name], rule_of(hints[field.name])
        default = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
        must = f"must {rule.text}" if rule else ""
        rows.append((f"`{field.name}`", _type(hint), _value(default), must, meanings[field.name]))
        choices += [
            (f"`{name}.{field.name}={choice}`", meaning)
            for enum in (hint, *get_args(hint))
            if get_origin(hint) is not list and isinstance(enum, type) and issubclass(enum, Enum)
            for choice, meaning in attribute_docs(enum).items()
        ]
    tables = [_table("field", "type", "default", "rule", "meaning", rows=rows)]
    if choices:
        tables.append(_table("choice", "meaning", rows=choices))
    return "\n".join([f"## {name}\n\n{inspect.getdoc(section)}\n", *tables])


def _table(*columns: str, rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _type(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return _type(hint.__origin__)
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return ", ".join(f"`{name}`" for name in hint.__members__)
    if get_origin(hint) in (list, dict):
        return f"{get_origin(hint).__name__} of {_type(get_args(hint)[-1])}"
    if type(None) in get_args(hint):
        return f"{_type(get_args(hint)[0])} or null"
    return "any" if hint is Any else hint.__name__


def _value(default: Any) -> str:
    """As on the command line."""
    if default == MISSING:
        return "required"
    text = json.dumps(default, default=lambda choice: choice.name)
    return f"`{text.replace(chr(34), '')}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
