"""An inspection of data for people: on the terminal, and as a page that needs no network.

The functions take any object with the fields of `eagle_rpc.data.inspection.Inspection`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eagle_rpc.report import page

_BAR_WIDTH = 40
_PAGE = """\
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
{% endfor %}
"""


def write_page(inspection: Any, sources: list[tuple[str, str]], name: str, path: Path) -> None:
    """Writes the page; `sources`: each path with its figures in words."""
    most = max(count for _, _, count in inspection.histogram)
    page.write_page(path, f"Training data of {name}", _PAGE, seen=inspection, sources=sources, most=most)


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
