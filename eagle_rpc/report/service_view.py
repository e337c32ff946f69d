"""Tables of a running service: targets, their load and sessions, trainers and their view of the targets.

Workers describe themselves, perhaps in another version: a value that is missing or of another type becomes a
dash.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
Cell = Callable[[Row], str | Text]

_ABSENT = "-"
_LARGEST_NUMBER = 1e18  # JSON allows whole numbers of any size
_LONGEST_WORD = 40
_STYLES = {
    "serving": "green",
    "training": "green",
    "draining": "yellow",
    "starting": "yellow",
    "incomplete": "red",
}


def service_view(look: Row) -> RenderableType:
    """Draws one look of `job=status` at the registry, which may have failed to answer (`error`)."""
    clock = time.strftime("%H:%M:%S", time.localtime(look["time"]))
    title = Text.assemble((clock, "bold"), f"  {_clean(look['registry'])}: ")
    if "error" in look:
        return Group(title + Text("no answer"), Text(f"\n{_clean(look['error'])}", style="red"))
    # The registry has checked its own fields, so they count before those of the status.
    roles = ("targets", "stages", "trainers")
    targets, stages, trainers = ([{**one["status"], **one} for one in look.get(role, ())] for role in roles)
    sessions = [{**one, "target": row["name"]} for row in targets for one in _dicts(row, "sessions")]
    runs = [{**one, "target": row["name"]} for row in targets for one in _dicts(row, "runs")]
    links = [{**one, "from": row["name"]} for row in trainers for one in _dicts(row, "targets")]
    num_targets, num_trainers = (sum(row["living"] for row in rows) for rows in (targets, trainers))
    title.append(f"{_counted(num_targets, 'target')}, {_counted(num_trainers, 'trainer')} living")
    tables = (
        ("Targets", _TARGETS, targets),
        ("Further stages of targets", _STAGES, stages),
        ("Load", _LOAD, targets),
        ("Quotas of runs", _QUOTAS, [one for one in runs if any(map(one.get, _QUOTA_KEYS))]),
        ("Sessions", _SESSIONS, sessions),
        ("Trainers", _TRAINERS, trainers),
        ("Targets as trainers see them", _LINKS, links),
    )
    shown: list[RenderableType] = [title]
    for name, columns, rows in tables:
        if rows:
            table = Padding(_table(columns, rows), (0, 0, 0, 2), expand=False)
            shown += [Text(f"\n{name}", style="bold"), table]
    if look.get("advice"):
        shown += [Text("\nAdvice", style="bold"), *(Text(f"  {_clean(line)}") for line in look["advice"])]
    return Group(*shown)


def _table(columns: Mapping[str, Cell], rows: Iterable[Row]) -> Table:
    """Columns by title without lines. `>` before a title: aligned right; `~` after it: folded if too wide."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in columns:
        table.add_column(
            title.strip(">~"),
            justify="right" if title.startswith(">") else "left",
            no_wrap=not title.endswith("~"),
            overflow="fold" if title.endswith("~") else "ellipsis",
        )
    for row in rows:
        cells = (cell(row) for cell in columns.values())
        # rich would read a plain string as markup.
        texts = (Text(cell) if isinstance(cell, str) else cell for cell in cells)
        table.add_row(*texts, style=None if row.get("living", True) else "dim")
    return table


# --- cells


def _text(key: str) -> Cell:
    return lambda row: _clean(row[key])


def _word(key: str, length: int = _LONGEST_WORD) -> Cell:
    return lambda row: _clean(row[key])[:length] if isinstance(row.get(key), str | int) else _ABSENT


def _formatted(form: Callable[[float], str]) -> Callable[[str], Cell]:
    """Makes cells of numbers."""

    def of(key: str) -> Cell:
        return lambda row: form(row[key]) if _is_number(row.get(key)) else _ABSENT

    return of


def _state(busy: str) -> Cell:
    """`busy`, or another state; a worker that has announced no status yet is starting."""

    def of(row: Row) -> Text:
        if not row["living"]:
            return Text(f"silent {_format_seconds(row['seconds_silent'])}", style="red")
        draining = busy == "serving" and row.get("draining")
        refusing = "incomplete" if row.get("paused") else "draining"
        state = (refusing if draining else busy) if row["status"] else "starting"
        return Text(state, style=_STYLES[state])

    return of


def _link_state(row: Row) -> Text:
    state = str(_word("state")(row))
    return Text(state, style=_STYLES.get(state, "red"))


def _model(row: Row) -> str:
    architecture, size, dtype = (str(_word(key)(row)) for key in ("architecture", "hidden_size", "dtype"))
    if architecture == _ABSENT:
        return _ABSENT
    dtype = dtype.removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    return f"{architecture.removesuffix('ForCausalLM')} {size} {dtype}"


def _failed(row: Row) -> str:
    counts = sorted(_counts(row, "requests").items())
    return ", ".join(f"{_clean(kind)} {_scaled(count, *_COUNTS)}" for kind, count in counts if kind != "ok")


# --- values


def _clean(text: object) -> str:
    """Text without characters that would control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def _dicts(row: Row, key: str) -> list[Row]:
    found = row.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _counts(row: Row, key: str) -> dict[str, float]:
    found = row.get(key)
    counts = found.items() if isinstance(found, dict) else ()
    return {name: count for name, count in counts if _is_number(count)}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _format_seconds(value: float) -> str:
    """45 ms, 3.2 s, 58 s, 12 min, 30 h."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.0f} h"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """The value in the largest of `units`, each `base` times the one before: 12, 3.4k, 5.6M."""
    scaled, unit = float(value), units[0]
    for larger in units[1:]:
        if abs(scaled) < base:
            break
        scaled, unit = scaled / base, larger
    return f"{scaled:.0f}{unit}" if unit == units[0] or scaled >= 100 else f"{scaled:.1f}{unit}"


_COUNTS = 1000, ("", "k", "M", "G", "T")
_BYTES = 1024, (" B", " KiB", " MiB", " GiB", " TiB")

_number = _formatted(lambda value: f"{value:,}")
_count = _formatted(lambda value: _scaled(value, *_COUNTS))
_size = _formatted(lambda value: _scaled(value, *_BYTES))
_seconds = _formatted(_format_seconds)
_share = _formatted(lambda value: f"{value:.0%}")
_megabytes = _formatted(lambda value: f"{value / 1e6:,.1f}")

# --- the tables

_TARGETS: dict[str, Cell] = {
    "name": _text("name"),
    "incarnation": _word("incarnation", 8),
    "state": _state("serving"),
    ">up": _seconds("uptime"),
    "model": _model,
    "device": _text("device"),
    ">memory": _size("resident_bytes"),
    ">on GPU": _size("device_bytes"),
    "host~": _text("host"),
}
_STAGES: dict[str, Cell] = {
    "name": _text("name"),
    "incarnation": _word("incarnation", 8),
    "state": _state("serving"),
    "chain": _word("chain", 8),
    ">queued": _number("queued"),
    ">passes": _count("passes"),
    "device": _text("device"),
    "host~": _text("host"),
}
_LOAD: dict[str, Cell] = {
    "target": _text("name"),
    ">running": _number("running"),
    ">queued": _number("queued"),
    ">sessions": lambda row: str(len(_dicts(row, "sessions"))),
    ">tok/s": _count("tokens_per_second"),
    ">MB/s": _megabytes("reply_bytes_per_second"),
    ">held": _size("reply_bytes_held"),
    ">limit": _size("max_reply_bytes"),
    ">answered": lambda row: _scaled(_counts(row, "requests").get("ok", 0), *_COUNTS),
    "failed~": _failed,
}
_QUOTA_KEYS = ("max_sessions", "max_requests", "max_reply_bytes")
_QUOTAS: dict[str, Cell] = {
    "target": _text("target"),
    "run": _word("run"),
    ">sessions": _number("sessions"),
    ">at most": _number("max_sessions"),
    ">queued": _number("queued"),
    ">under way at most": _number("max_requests"),
    ">held": _size("reply_bytes_held"),
    ">held at most": _size("max_reply_bytes"),
    ">refused": _count("refused"),
}
_SESSIONS: dict[str, Cell] = {
    "target": _text("target"),
    "session": _word("id"),
    "run": _word("run"),
    "trainer": _word("trainer"),
    "encoding": _word("encoding"),
    ">queued": _number("queued"),
    ">lease": _seconds("lease_left"),
    ">requests": _count("requests"),
    ">tokens": _count("tokens"),
    ">held": _size("reply_bytes_held"),
}
_TRAINERS: dict[str, Cell] = {
    "name": _text("name"),
    "incarnation": _word("incarnation", 8),
    "state": _state("training"),
    "run": _text("run"),
    "device": _text("device"),
    ">step": lambda row: f"{_number('step')(row)}/{_number('total_steps')(row)}",
    ">tok/s": _count("tokens_per_second"),
    ">waiting": _share("wait_share"),
    ">failovers": _number("failovers"),
}
_LINKS: dict[str, Cell] = {
    "trainer": _text("from"),
    "target": _word("name"),
    "incarnation": _word("incarnation", 8),
    "state": _link_state,
    ">under way": _number("outstanding"),
    ">a request": _seconds("seconds_per_request"),
}
