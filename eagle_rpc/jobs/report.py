"""`job=report`: makes the page of a run anew from the files of its directory."""

import sys
from pathlib import Path

from eagle_rpc.config import Config
from eagle_rpc.errors import DataError
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.report.run_page import write_report
from eagle_rpc.report.sources import read_sources


def run(config: Config) -> int:
    """Writes `report.output`; 0. Raises `DataError` for a directory without figures."""
    sys.stdout.write(make_report(config))
    return 0


def make_report(config: Config) -> str:
    """Writes the page with all that `run.dir` holds; returns its advice and its path as lines for a terminal.

    Raises as `run`.
    """
    directory, output = RunDirectory.of(config), Path(config.report.output)
    sources = read_sources(
        name=config.run.name,
        config=directory.config,
        metrics=directory.metrics,
        training=directory.training,
        evaluation=directory.evaluation,
        comparison=Path(config.compare.output),
    )
    if sources.is_empty:
        raise DataError(
            f"run.dir must hold figures of a training, an evaluation or a comparison, {directory.path} has none"
        )
    advice = write_report(sources, output)
    return "".join(f"next: {line}\n" for line in advice) + f"wrote {output}\n"
