"""`docs/targets.md`: what every family of transformers does, written from its outcomes and read back."""

import re
from collections.abc import Iterable

from support.family_jobs import Outcome

_HEAD = """\
# Targets

`python docs/generate_targets.py > docs/targets.md` makes this page: it builds a tiny random model of every
model type of transformers {version} that continues text, alone or in a vision-language model, in fp32 on a
CPU, and runs the jobs of the README on it. `tests/unit/jobs/test_families.py` keeps it true.

A family that does not run is refused before training, or before the job that it lacks, in one sentence.
Models with code of their own are refused, since no code that a model ships is run. Left out are families
that need images, packages, or sizes that cannot be made small one by one.

`topology.devices_per_target` and `topology.stages_per_target` need parts that run in a line: embedding, layers,
head. Several stages also need layers that hand each other hidden states and nothing else; families whose
layers share keys or other states (Gemma 4) are refused by name.

## Families that run

{whole} of {total} families supervise, train, export, evaluate and regenerate.

| column | meaning |
|---|---|
| training | "yes", or the settings that an error names and that make it run |
| packing | whether `data.packing=true` is exact; other families take one chat a row |
| answers | of `job=regenerate`: by the batched engine, or by transformers' slower `generate` |

| family | class | training | packing | answers |
|---|---|---|---|---|
"""
_REFUSED = """
## Families that are refused

| family | job | reason |
|---|---|---|
"""
# Figures of a probe differ from machine to machine.
_FIGURES = re.compile(r" ?\((relative error|one chat changes)[^)]*\)|, got a relative error of \S+")
_PLACE = re.compile(r"/\S*/site-packages/")


def page(outcomes: Iterable[Outcome], *, version: str) -> str:
    """The page in Markdown."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.family)
    whole = [outcome for outcome in outcomes if outcome.whole]
    head = _HEAD.format(version=version, whole=len(whole), total=len(outcomes))
    rest = [row(outcome) for outcome in outcomes if not outcome.whole]
    return head + "".join(map(row, whole)) + _REFUSED + "".join(rest)


def row(outcome: Outcome) -> str:
    """The line of one family."""
    said = outcome.said
    if outcome.whole:
        training = said["train"].removeprefix("yes, with ")
        answers = said["regenerate"].removeprefix("yes, by ").replace("yes", "engine")
        cells = [outcome.family, outcome.architecture, training, _yes(said["packed"]), answers]
    else:
        job, text = next((job, text) for job, text in said.items() if job != "packed" and text[:3] != "yes")
        cells = [outcome.family, job, _plain(text)]
    return f"| {' | '.join(cells)} |\n"


def rows_of(text: str) -> dict[str, str]:
    """The lines of a page by family."""
    lines = [line for line in text.splitlines(keepends=True) if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def _yes(said: str) -> str:
    return "yes" if said == "yes" else "no"


def _plain(text: str) -> str:
    return _PLACE.sub("", _FIGURES.sub("", text)).replace("|", "/")[:240]
