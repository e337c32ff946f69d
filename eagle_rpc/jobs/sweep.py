"""`--multirun`: the jobs of several runs one after the other, each in a process of its own, then their table and plot.

A run that ends with an error does not stop the others. The same command again skips what is finished and goes on
with what is not.
"""

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from eagle_rpc.config import Config
from eagle_rpc.config.checks import as_message
from eagle_rpc.config.choices import JobName, Resume
from eagle_rpc.config.launch import num_workers
from eagle_rpc.config.sweeps import Sweep, SweptRun
from eagle_rpc.errors import ConfigError, WaitTimeout
from eagle_rpc.evaluate.intervals import bootstrap_gain
from eagle_rpc.process import World, read_world, stop_signals
from eagle_rpc.process.children import job_command, last_lines, run_child
from eagle_rpc.process.files import replaced_file
from eagle_rpc.process.logs import message_of, setup_logging
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.report.plots import plot_sweep
from eagle_rpc.report.sweep_table import SweptResult, print_table, write_csv, write_markdown
from eagle_rpc.train import plain

logger = logging.getLogger(__name__)

_RECORD, _LOG = "sweep_run.json", "jobs.log"
_WIDTH = 200
# They decide how and where a run computes, not what it is.
_OWN_OF_COMMAND = re.compile(r"job\.\w+|run\.(threads|log_format|shared_dir)|train\.resume|\w+\.device")
# Of lines of the launcher.
_LAUNCH = "launch: "


@dataclass(slots=True)
class _Record:
    """What is known of one run, kept in its directory."""

    settings: dict[str, Any]
    finished: list[str] = field(default_factory=list)
    """Names of the jobs that have ended well."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each job, those of attempts that failed included."""
    failure: str | None = None

    @classmethod
    def read(cls, path: Path) -> "_Record | None":
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def write(self, path: Path) -> None:
        with replaced_file(path) as fresh:
            fresh.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def run(sweep: Sweep) -> int:
    """Runs what is not finished; 0 if all runs are. Raises `ConfigError` before the first run."""
    world = read_world()
    _check_workers(sweep, world)
    if world.rank:
        # The first worker starts a torchrun for each run.
        return 0
    directory = RunDirectory(sweep.directory)
    with stop_signals() as stop, directory.claimed(Resume.auto):
        log_format = sweep.runs[0].config.run.log_format
        setup_logging("sweep", directory.log_file("sweep"), log_format=log_format)
        records = _records(sweep)
        answers = _answered(sweep, records)
        for number, swept in enumerate(sweep.runs, start=1):
            if stop.is_set():
                break
            logger.info("run %d of %d: %s", number, len(sweep.runs), swept.name)
            _Run(swept, sweep.directory, records[swept.name], answers, stop).run()
        results = _results(sweep, records)
        _write(results, sweep.directory)
    return 0 if all(one.outcome == "finished" for one in results) else 1


def _check_workers(sweep: Sweep, world: World) -> None:
    """Under torchrun the number of workers has to be that of every run; only one agent can start them."""
    if not world.launched:
        return
    if world.num_agents > 1:
        raise ConfigError(
            f"--multirun must run under one torchrun agent, got {world.num_agents}: start each run by itself"
        )
    for swept in sweep.runs:
        if JobName.train in swept.jobs and (wanted := num_workers(swept.config)) != world.size:
            raise ConfigError(
                f"--nproc-per-node must be {wanted} for {swept.name}, got {world.size}; without torchrun, "
                "--multirun starts the workers of each run by itself"
            )


def _settings(config: Config) -> dict[str, Any]:
    """The settings by path that tell whether a finished run is the one that is asked for."""
    return {
        path: value
        for section, values in plain(config).items()
        for name, value in values.items()
        if not _OWN_OF_COMMAND.fullmatch(path := f"{section}.{name}")
    }


def _records(sweep: Sweep) -> dict[str, _Record]:
    """The record of each run. Raises `ConfigError` for runs that were done with other settings."""
    records, mistakes = {}, []
    for swept in sweep.runs:
        path, settings = sweep.directory / swept.name / _RECORD, _settings(swept.config)
        found = _Record.read(path)
        if found is None or not found.finished:
            records[swept.name] = _Record(settings, seconds={} if found is None else found.seconds)
            continue
        changed = [name for name, value in settings.items() if found.settings.get(name, value) != value]
        if changed:
            changes = ", ".join(f"{name}={found.settings[name]}, now {settings[name]}" for name in changed)
            mistakes.append(
                f"{path.parent} must be a run of the same settings, got {changes}: "
                "name the sweep by another run.name, or remove that directory"
            )
        records[swept.name] = found
    if mistakes:
        raise ConfigError(as_message(mistakes, "in the sweep"))
    return records


def _answered(sweep: Sweep, records: dict[str, _Record]) -> dict[str, str | None]:
    """The files of answers that an earlier command has completed; null: without a failure."""
    files = [
        Path(swept.config.regenerate.output)
        for swept in sweep.runs
        if JobName.regenerate.name in records[swept.name].finished
    ]
    return {str(file): None for file in files if file.exists()}


class _Run:
    """The jobs of one run that are still to do."""

    def __init__(
        self,
        swept: SweptRun,
        sweep_directory: Path,
        record: _Record,
        answers: dict[str, str | None],
        stop: threading.Event,
    ) -> None:
        """`answers`: files that this sweep has completed, or the reason why not."""
        self._swept, self._record, self._answers, self._stop = swept, record, answers, stop
        self._directory = sweep_directory / swept.name

    def run(self) -> None:
        """Runs them up to the first that fails; the record has the outcome."""
        todo = [job for job in self._swept.jobs if job.name not in self._record.finished]
        if not todo:
            logger.info("  finished earlier")
            return
        self._record.failure = None
        for job in todo:
            reason = self._answer() if job is JobName.regenerate else self._run_job(job)
            if self._stop.is_set():
                reason = "stopped; the same command goes on"
            if reason is None:
                self._record.finished.append(job.name)
            else:
                self._record.failure = f"job={job.name}: {reason}"
                logger.error("  %s failed: %s", self._swept.name, self._record.failure)
            self._record.write(self._directory / _RECORD)
            if reason is not None:
                return

    def _answer(self) -> str | None:
        """Lets the target answer, once for all runs that read the file."""
        file = self._swept.config.regenerate.output
        if file not in self._answers:
            self._answers[file] = self._run_job(JobName.regenerate)
        return self._answers[file]

    def _run_job(self, job: JobName) -> str | None:
        """Null, or the reason of its failure."""
        log, started = self._directory / _LOG, time.monotonic()
        workers = num_workers(self._swept.config) if job is JobName.train else None
        how = "" if workers is None else f" with {workers} workers"
        logger.info("  job=%s%s, log in %s", job.name, how, log)
        command = job_command([f"job={job.name}", *self._swept.overrides], num_workers=workers)
        seconds = self._swept.config.job.sweep_timeout
        try:
            code = run_child(command, f"job={job.name}", log=log, seconds=seconds, stop=self._stop)
            reason = _reason(log) if code else None
        except WaitTimeout as error:
            reason = str(error)
        spent = time.monotonic() - started
        self._record.seconds[job.name] = self._record.seconds.get(job.name, 0.0) + spent
        return reason


def _reason(log: Path) -> str:
    """The last words of a job that failed, without the log's prefix."""
    whole = [line.removeprefix(_LAUNCH) for line in last_lines(log).splitlines() if line.strip()]
    lines = [message_of(line) for line in whole]
    differing = [line for line in lines if "DIFFER" in line]
    return (differing or lines or ["no output"])[-1].strip()


def _results(sweep: Sweep, records: dict[str, _Record]) -> list[SweptResult]:
    """What each run has come to; the gain is that over the first run with an evaluation of the same prompts."""
    results, first = [], None
    for swept in sweep.runs:
        record, files = records[swept.name], RunDirectory(sweep.directory / swept.name)
        result = SweptResult(values=swept.values, outcome=_outcome(swept, record))
        if JobName.train.name in record.finished and files.metrics.exists():
            _add_training(result, list(read_metrics(files.metrics)))
            result.train_seconds = record.seconds.get(JobName.train.name)
        if JobName.evaluate.name in record.finished and files.evaluation.exists():
            evaluation = json.loads(files.evaluation.read_text(encoding="utf-8"))
            first = first or evaluation
            _add_evaluation(result, evaluation, first)
        results.append(result)
    return results


def _outcome(swept: SweptRun, record: _Record) -> str:
    if record.failure is not None:
        return record.failure
    return "finished" if {job.name for job in swept.jobs} <= set(record.finished) else "not run"


def _add_training(result: SweptResult, lines: Sequence[dict[str, Any]]) -> None:
    """The supervised tokens of training, and validations over them."""
    tokens = 0
    for line in lines:
        tokens += line.get("supervised_tokens", 0)
        if "validation/accept_length" in line:
            result.validations.append((tokens, line["validation/accept_length"]))
    result.supervised_tokens = tokens


def _add_evaluation(result: SweptResult, evaluation: dict[str, Any], first: dict[str, Any]) -> None:
    result.accept_length = evaluation["accept_length"]
    result.interval = evaluation["accept_length_interval"]
    asked, asked_first = ([one["prompt"] for one in some["prompts"]] for some in (evaluation, first))
    if evaluation is not first and asked == asked_first:
        result.gain = evaluation["accept_length"] - first["accept_length"]
        result.gain_interval = bootstrap_gain(_tokens_and_calls(first), _tokens_and_calls(evaluation))


def _tokens_and_calls(evaluation: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Of each prompt: tokens of its drafts, the target's own included, and drafts."""
    prompts = evaluation["prompts"]
    calls = [one["num_drafts"] for one in prompts]
    return [sum(one["accepted_per_position"], one["num_drafts"]) for one in prompts], calls


def _write(results: Sequence[SweptResult], directory: Path) -> None:
    files = [directory / name for name in ("sweep.csv", "sweep.md", "plots/sweep.png")]
    write_csv(results, files[0])
    write_markdown(results, files[1])
    if any(one.accept_length is not None or one.validations for one in results):
        plot_sweep(results, files[2])
    else:
        files.pop()
    # A file has no width that cells must be folded to.
    width = None if sys.stdout.isatty() else _WIDTH
    print_table(results, Console(file=sys.stdout, highlight=False, width=width))
    sys.stdout.write("".join(f"wrote {file}\n" for file in files))
