"""The same steps with a co-located and with a remote target, compared bit by bit.

This process starts the workers of both sides, one torchrun after the other (`verify_worker`), and compares
their records.
"""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from eagle_rpc.config import Config
from eagle_rpc.config.choices import Resume, VerifySide
from eagle_rpc.config.compose import write_config
from eagle_rpc.config.schema import TopologyConfig
from eagle_rpc.config.texts import parse_pair
from eagle_rpc.errors import TargetFailed, WaitTimeout
from eagle_rpc.jobs.verify_worker import record_path, record_steps
from eagle_rpc.process.children import job_command, last_lines
from eagle_rpc.process.files import replaced_file
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.process.startup import start_worker
from eagle_rpc.supervision import ENCODINGS
from eagle_rpc.train.recording import QUANTITIES, Comparison, compare_records

logger = logging.getLogger(__name__)

_SIDES = (VerifySide.colocated, VerifySide.remote)


def run(config: Config) -> int:
    """Prints a table and writes `verify.json`; 0 if all is equal, 1 otherwise."""
    if config.job.verify_side is not VerifySide.both:
        return record_steps(config)
    start_worker(config, "verify")
    comparisons: list[Comparison] = []
    for topology in config.job.verify_topologies:
        for side in _SIDES:
            _run_side(config, topology, side)
        comparisons += _compare(config, topology)
    report = RunDirectory.of(config).verification
    with replaced_file(report) as fresh:
        fresh.write_text(json.dumps([asdict(comparison) for comparison in comparisons], indent=2) + "\n")
    sys.stdout.write("\n".join([*_table(comparisons), f"wrote {report}"]) + "\n")
    return 0 if all(comparison.passed for comparison in comparisons) else 1


def _run_side(config: Config, topology: str, side: VerifySide) -> None:
    """Raises `TargetFailed` naming the log if a worker fails, `WaitTimeout` after `job.verify_timeout`."""
    workers = _topology_of(topology)
    directory = _side_directory(config, topology, side)
    # A run never overwrites checkpoints, and an earlier verification left some here.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_config(_side_config(config, side, directory, workers), directory / "side.yaml")
    count = workers.trainers + (workers.targets if side is VerifySide.remote else 0)
    words = ["--config-path", str(directory.resolve()), "--config-name", "side"]
    command = job_command(words, num_workers=count)
    log, seconds = directory / "workers.log", config.job.verify_timeout
    logger.info("%s, %s target: %d workers, log in %s", topology, side.name, count, log)
    with log.open("w") as output:
        try:
            code = subprocess.run(command, stdout=output, stderr=output, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            raise WaitTimeout(
                f"{topology} {side.name} did not end within {seconds:.0f} s, see {log}"
            ) from None
    if code:
        raise TargetFailed(f"{topology} {side.name} ended with code {code}, see {log}:\n{last_lines(log)}")


def _topology_of(pair: str) -> TopologyConfig:
    """The topology of "TxR": T targets and R trainers."""
    targets, trainers = parse_pair(pair)
    return TopologyConfig(targets=targets, trainers=trainers)


def _side_directory(config: Config, topology: str, side: VerifySide) -> Path:
    return RunDirectory.of(config).path / topology / side.name


def _side_config(config: Config, side: VerifySide, directory: Path, topology: TopologyConfig) -> Config:
    """The configuration of one side. Bits depend on the number of threads, so the default is one a worker."""
    steps = config.job.verify_steps
    return replace(
        config,
        job=replace(config.job, verify_side=side),
        run=replace(config.run, dir=str(directory), threads=config.run.threads or 1),
        topology=topology,
        train=replace(config.train, max_steps=steps, max_epochs=None, log_every=1, resume=Resume.never),
    )


def _compare(config: Config, topology: str) -> Iterator[Comparison]:
    trainers = range(_topology_of(topology).trainers)
    for encoding in config.job.verify_encodings:
        colocated, remote = (
            [json.loads(record_path(directory, encoding.name, trainer).read_text()) for trainer in trainers]
            for directory in (_side_directory(config, topology, side) for side in _SIDES)
        )
        yield compare_records(topology, encoding.name, colocated, remote)


def _table(comparisons: list[Comparison]) -> Iterator[str]:
    names = "".join(f"{name:<13}" for name in QUANTITIES)
    yield f"{'topology':<10}{'encoding':<12}{'tensors':>8}{'rows':>8}  {names}"
    for line in comparisons:
        verdicts = "".join(f"{'bitwise' if line.equal[name] else 'DIFFERENT':<13}" for name in QUANTITIES)
        yield f"{line.topology:<10}{line.encoding:<12}{line.tensors:>8}{line.rows:>8}  {verdicts}"
    if rounded := sorted({line.encoding for line in comparisons if not ENCODINGS[line.encoding].exact}):
        yield f"not exact: {', '.join(rounded)} (both sides round the target's states alike)"
