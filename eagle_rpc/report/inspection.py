"""An inspection of data for people: on the terminal, and as a page that needs no network.

The functions take any object with the fields of `eagle_rpc.data.inspection.Inspection`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eagle_rpc.process.files import replaced_file

_BAR_WIDTH = 40
_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training data of {{ name }}</title>
<style>
:root { color-scheme: light dark; --said: #c9f0d0; --line: #8884; --bar: #4a8; }
@media (prefers-color-scheme: dark) { :root { --said: #1d4a2b; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
td, th { text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.path { overflow-wrap: anywhere; min-width: 8rem; }
.bar { background: var(--bar); height: .8rem; min-width: 1px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); padding: .7rem; }
pre { border-radius: 6px; }
mark { background: var(--said); color: inherit; border-radius: 3px; }
.chosen td { font-weight: 700; }
</style></head><body>
<h1>Training data of {{ name }}</h1>
<p>{{ "{:,}".format(seen.num_samples) }} samples, {{ "{:,}".format(seen.num_tokens) }} tokens,
{{ "%.1f" | format(100 * seen.supervised_share) }} % of the tokens supervised,
chats equal to another one: {{ seen.duplicates }}.</p>
{% if seen.advice %}<h2>Advice</h2><ul>{% for line in seen.advice %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
<h2>Chat template</h2><ul>{% for line in seen.template %}<li>{{ line }}</li>{% endfor %}</ul>
<h2>Sources</h2><table><tr><th>source</th><th>content</th></tr>
{% for path, line in sources %}<tr><td class="path">{{ path }}</td><td>{{ line }}</td></tr>{% endfor %}</table>
<h2>Lengths in tokens</h2><table>
<tr><th class="n">samples</th><th class="n">tokens at most</th></tr>
{% for share, tokens in seen.lengths %}<tr><td class="n">{{ "%g" | format(100 * share) }} %</td>
<td class="n">{{ tokens }}</td></tr>{% endfor %}</table>
<table>{% for low, high, count in seen.histogram %}<tr><td class="n">{{ low }} to {{ high }}</td>
<td class="n">{{ count }}</td><td style="width: 20rem; vertical-align: middle"><div class="bar"
style="width: {{ (100 * count / most) | round(1) }}%"></div></td></tr>{% endfor %}</table>
<h2>Coverage of draft vocabularies</h2><table>
<tr><th class="n">draft.vocab_size</th><th class="n">predicted tokens covered</th></tr>
{% for size, share in seen.coverage %}<tr{% if size == seen.draft_vocab_size %} class="chosen"{% endif %}>
<td class="n">{{ size }}</td><td class="n">{{ "%.2f" | format(100 * share) }} %</td></tr>{% endfor %}</table>
<h2>Samples</h2><p>Marked text is supervised: the draft learns to guess it.</p>
{% for sample in seen.samples %}<pre>{% for text, said in sample %}{% if said %}<mark>{{ text }}</mark>\
{% else %}{{ text }}{% endif %}{% endfor %}</pre>
{% endfor %}</body></html>
"""


def write_page(inspection: Any, sources: list[tuple[str, str]], name: str, path: Path) -> None:
    """Writes the page; `sources`: each path with its figures in words."""
    most = max(count for _, _, count in inspection.histogram)
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(seen=inspection, sources=sources, name=name, most=most)
    with replaced_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def print_inspection(inspection: Any, sources: list[tuple[str, str]], console: Console) -> None:
    """Prints the figures and the samples, whose supervised text is coloured."""
    for path, line in sources:
        console.print(Text.assemble((path, "bold"), f": {line}"))
    for line in inspection.template:
        console.print(Text(f"chat template: {line}"))
    console.print(
        f"{inspection.num_samples} samples, {inspection.num_tokens} tokens, "
        f"{100 * inspection.supervised_share:.1f} % supervised, "
        f"chats equal to another one: {inspection.duplicates}"
    )
    for table in _tables(inspection):
        console.print(table)
    for number, sample in enumerate(inspection.samples, start=1):
        console.rule(f"sample {number}: supervised text in green", align="left")
        console.print(Text.assemble(*((text, "green" if said else "dim") for text, said in sample)))
    for line in inspection.advice:
        console.print(Text(f"advice: {line}", style="bold yellow"))


def _tables(inspection: Any) -> Iterator[Table]:
    lengths = Table(title="lengths in tokens", title_justify="left")
    for share, _ in inspection.lengths:
        lengths.add_column(f"{100 * share:g} %", justify="right")
    lengths.add_row(*(str(tokens) for _, tokens in inspection.lengths))
    yield lengths
    histogram = Table("tokens", "samples", "", title="histogram", title_justify="left", box=None)
    most = max(count for _, _, count in inspection.histogram)
    for low, high, count in inspection.histogram:
        histogram.add_row(f"{low} to {high}", str(count), "█" * round(_BAR_WIDTH * count / most))
    yield histogram
    coverage = Table("draft.vocab_size", "predicted tokens covered", title="coverage", title_justify="left")
    for size, share in inspection.coverage:
        style = "bold" if size == inspection.draft_vocab_size else ""
        coverage.add_row(str(size), f"{100 * share:.2f} %", style=style)
    yield coverage
