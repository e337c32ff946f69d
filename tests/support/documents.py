"""Reads the pages of the repository for the tests that keep them true."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "eagle_rpc"
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def section(heading: str) -> str:
    """The text of `docs/architecture.md` below the heading that begins so, up to the next heading."""
    parts = re.split(r"^#+ ", ARCHITECTURE.read_text(), flags=re.MULTILINE)
    return next(part for part in parts if part.startswith(heading))


def path_table(heading: str) -> dict[str, list[str]]:
    """The functions by file in the table of that section; a file may stand in it once."""
    rows = re.findall(r"^\| `([^`]+\.py)` \| ([^|]+) \|", section(heading), flags=re.MULTILINE)
    assert len(dict(rows)) == len(rows), f"{heading}: a file is listed twice"
    return {file: re.findall(r"`([^`]+)`", functions) for file, functions in rows}
