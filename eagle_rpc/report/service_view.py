"""A running service as people see it: targets, their sessions, trainers and what these think of the targets.

It is drawn from what workers say of themselves, who may be of another version: what is missing or of another type is a dash.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_ABSENT = "-"
_ABSURD = 1e18
_STYLES = {"serving": "green", "training": "green", "draining": "yellow", "starting": "yellow"}


def service_view(look: Mapping[str, Any]) -> RenderableType:
    """Draws one look of `job=status` at a registry that answered."""
    targets, trainers = look["targets"], look["trainers"]
    living = [sum(worker["living"] for worker in workers) for workers in (targets, trainers)]
    parts: list[RenderableType] = [
        _heading(look, f"{_counted(living[0], 'target')}, {_counted(living[1], 'trainer')} living")
    ]
    if targets:
        parts += _section("Targets", _targets(targets))
        parts += _section("Load", _loads(targets))
        if sessions := [(target, one) for target in targets for one in _dicts(target["status"], "sessions")]:
            parts += _section("Sessions", _sessions(sessions))
    if trainers:
        parts += _section("Trainers", _trainers(trainers))
        if opinions := [
            (trainer, one) for trainer in trainers for one in _dicts(trainer["status"], "targets")
        ]:
            parts += _section("Targets as trainers see them", _opinions(opinions))
    return Group(*parts)


def failed_view(look: Mapping[str, Any]) -> RenderableType:
    """Draws one look at a registry that did not answer."""
    return Group(_heading(look, "no answer"), Text(f"\n{_clean(look['error'])}", style="red"))


def _heading(look: Mapping[str, Any], summary: str) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(look["time"]))
    return Text.assemble((clock, "bold"), f"  {_clean(look['registry'])}: {summary}")


def _section(title: str, table: Table) -> list[RenderableType]:
    return [Text(f"\n{title}", style="bold"), Padding(table, (0, 0, 0, 2), expand=False)]


def _targets(targets: Iterable[Mapping[str, Any]]) -> Table:
    table = _table("name", "incarnation", "state", ">up", "model", "device", ">memory", ">on GPU", "host~")
    for target in targets:
        status = target["status"]
        _add_row(
            table,
            *_identity(target, "draining" if status.get("draining") else "serving"),
            _seconds(status.get("uptime")),
            _model(status),
            target["device"],
            _size(status.get("resident_bytes")),
            _size(status.get("device_bytes")),
            target["host"],
        )
    return table


def _loads(targets: Iterable[Mapping[str, Any]]) -> Table:
    table = _table(
        "target",
        ">running",
        ">queued",
        ">sessions",
        ">tok/s",
        ">MB/s",
        ">held",
        ">limit",
        ">answered",
        "failed~",
    )
    for target in targets:
        status = target["status"]
        outcomes = _counts(status, "requests")
        _add_row(
            table,
            target["name"],
            _number(status, "running"),
            _number(status, "queued"),
            str(len(_dicts(status, "sessions"))),
            _count(status.get("tokens_per_second")),
            _megabytes(status.get("reply_bytes_per_second")),
            _size(status.get("reply_bytes_held")),
            _size(status.get("max_reply_bytes")),
            _count(outcomes.get("ok", 0)),
            ", ".join(
                f"{_clean(kind)} {_count(count)}" for kind, count in sorted(outcomes.items()) if kind != "ok"
            ),
            dim=not target["living"],
        )
    return table


def _sessions(sessions: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Table:
    table = _table(
        "target",
        "session",
        "job",
        "trainer",
        "encoding",
        ">queued",
        ">lease",
        ">requests",
        ">tokens",
        ">held",
    )
    for target, session in sessions:
        _add_row(
            table,
            target["name"],
            *(_word(session, key) for key in ("id", "job", "trainer", "encoding")),
            _number(session, "queued"),
            _seconds(session.get("lease_left")),
            _count(session.get("requests")),
            _count(session.get("tokens")),
            _size(session.get("reply_bytes_held")),
        )
    return table


def _trainers(trainers: Iterable[Mapping[str, Any]]) -> Table:
    table = _table(
        "name", "incarnation", "state", "job", "device", ">step", ">tok/s", ">waiting", ">failovers"
    )
    for trainer in trainers:
        status = trainer["status"]
        share = status.get("wait_share")
        _add_row(
            table,
            *_identity(trainer, "training"),
            _clean(trainer["job"]),
            trainer["device"],
            f"{_number(status, 'step')}/{_number(status, 'total_steps')}",
            _count(status.get("tokens_per_second")),
            f"{share:.0%}" if _is_number(share) else _ABSENT,
            _number(status, "failovers"),
        )
    return table


def _opinions(opinions: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Table:
    table = _table("trainer", "target", "incarnation", "state", ">under way", ">a request")
    for trainer, opinion in opinions:
        state = _word(opinion, "state")
        _add_row(
            table,
            trainer["name"],
            _word(opinion, "name"),
            _word(opinion, "incarnation")[:8],
            Text(state, style=_STYLES.get(state, "red")),
            _number(opinion, "outstanding"),
            _seconds(opinion.get("seconds_per_request")),
        )
    return table


def _table(*columns: str) -> Table:
    """Aligned columns without lines: `>` before a title marks numbers, `~` after it text that is folded where there is no room."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        justify, folded = "right" if column.startswith(">") else "left", column.endswith("~")
        table.add_column(
            column.strip(">~"), justify=justify, no_wrap=not folded, overflow="fold" if folded else "ellipsis"
        )
    return table


def _add_row(table: Table, *cells: str | Text, dim: bool = False) -> None:
    # A plain string would be read as rich's markup.
    table.add_row(
        *(Text(cell) if isinstance(cell, str) else cell for cell in cells), style="dim" if dim else None
    )


def _identity(worker: Mapping[str, Any], busy_state: str) -> tuple[str, str, Text]:
    """Name, incarnation and state; a worker that has not said anything of itself yet is starting."""
    if not worker["living"]:
        state = Text(f"silent {_seconds(worker['seconds_silent'])}", style="red")
    else:
        word = busy_state if worker["status"] else "starting"
        state = Text(word, style=_STYLES[word])
    return worker["name"], worker["incarnation"][:8], state


def _model(status: Mapping[str, Any]) -> str:
    architecture = _word(status, "architecture").removesuffix("ForCausalLM")
    dtype = _word(status, "dtype").removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    return f"{architecture} {_word(status, 'hidden_size')} {dtype}" if architecture != _ABSENT else _ABSENT


# --- single values


def _clean(text: Any) -> str:
    """Workers' words must not steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def _word(values: Mapping[str, Any], key: str) -> str:
    return _clean(values[key])[:40] if isinstance(values.get(key), str | int) else _ABSENT


def _number(values: Mapping[str, Any], key: str) -> str:
    return f"{values[key]:,}" if _is_number(values.get(key)) else _ABSENT


def _dicts(values: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = values.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _counts(values: Mapping[str, Any], key: str) -> dict[str, int]:
    found = values.get(key)
    return (
        {name: count for name, count in found.items() if _is_number(count)} if isinstance(found, dict) else {}
    )


def _is_number(value: Any) -> bool:
    """Whether it is one that can be real: JSON knows whole numbers of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _ABSURD


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _count(value: Any) -> str:
    """12, 3.4k, 5.6M."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T")) if _is_number(value) else _ABSENT


def _size(value: Any) -> str:
    """Bytes in binary units: 12 B, 3.4 MiB."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB")) if _is_number(value) else _ABSENT


def _megabytes(value: Any) -> str:
    return f"{value / 1e6:,.1f}" if _is_number(value) else _ABSENT


def _seconds(value: Any) -> str:
    """45 ms, 3.2 s, 58 s, 12 min, 30 h."""
    if not _is_number(value):
        return _ABSENT
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.0f} h"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    scaled, unit = float(value), units[0]
    for larger in units[1:]:
        if abs(scaled) < base:
            break
        scaled, unit = scaled / base, larger
    return f"{scaled:.0f}{unit}" if unit == units[0] or scaled >= 100 else f"{scaled:.1f}{unit}"
