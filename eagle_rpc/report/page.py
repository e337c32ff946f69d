"""What all pages share: style, and the writing of a page that needs no network."""

from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from eagle_rpc.process.files import replaced_file

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f23; --dim: #57606a; --paper: #fff; --said: #c9f0d0;
  --line: #8884; --bar: #4a8; --accept: #2da44e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9aa5b1; --paper: #0f1318;
  --said: #1d4a2b; --accept: #3fb950; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 1.5rem auto; padding: 0 1rem; }
body { color: var(--ink); background: var(--paper); }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
td, th { text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.path { overflow-wrap: anywhere; min-width: 7rem; }
.dim { color: var(--dim); }
.bar { background: var(--bar); height: .8rem; min-width: 1px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); padding: .7rem; }
pre { border-radius: 6px; }
mark { background: var(--said); color: inherit; border-radius: 3px; }
.chosen td { font-weight: 700; }
"""
_FRAME = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><link rel="icon" href="data:,">
<style>{{ style }}</style></head><body>
<h1>{{ title }}</h1>
{{ body }}
</body></html>
"""


def write_page(path: Path, title: str, template: str, *, style: str = "", **values: Any) -> None:
    """Writes `template` of jinja2, filled with `values` and escaped, into the frame of all pages, in one piece."""
    environment = Environment(autoescape=True, trim_blocks=True)
    body = environment.from_string(template).render(**values)
    text = environment.from_string(_FRAME).render(
        title=title, style=Markup(_STYLE + style), body=Markup(body)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
