"""The same steps with a co-located and with a remote target, compared bit by bit.

This process only starts the workers of either side, one torchrun after the other, and compares what they recorded.
"""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eagle_rpc.config import Config
from eagle_rpc.config.choices import Resume, VerifySide
from eagle_rpc.config.compose import write_config
from eagle_rpc.config.schema import TopologyConfig
from eagle_rpc.config.texts import parse_pair
from eagle_rpc.errors import TargetFailed, WaitTimeout
from eagle_rpc.jobs.verify_worker import record_path, record_steps
from eagle_rpc.process.startup import start_worker
from eagle_rpc.train import RunDirectory

logger = logging.getLogger(__name__)

_SIDES = (VerifySide.colocated, VerifySide.remote)
_QUANTITIES = ("supervision", "loss", "grad_norm", "weights")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One encoding in one topology."""

    topology: str
    encoding: str
    tensors: int  # supervision tensors of all trainers and steps
    rows: int  # supervised rows in them; without any, equality says nothing
    equal: dict[str, bool]  # by quantity

    @property
    def passed(self) -> bool:
        return self.rows > 0 and all(self.equal.values())


def run(config: Config) -> int:
    """Prints a table and writes `verify.json`; 0 if everything is equal, 1 otherwise."""
    if config.job.verify_side is not VerifySide.both:
        return record_steps(config)
    start_worker(config, "verify")
    comparisons = []
    for topology in config.job.verify_topologies:
        for side in _SIDES:
            _run_side(config, topology, side)
        comparisons += _compare(config, topology)
    RunDirectory.of(config).verification.write_text(
        json.dumps([asdict(row) for row in comparisons], indent=2) + "\n"
    )
    sys.stdout.write("\n".join(_table(comparisons)) + "\n")
    sys.stdout.write(f"wrote {RunDirectory.of(config).verification}\n")
    return 0 if all(row.passed for row in comparisons) else 1


def _run_side(config: Config, topology: str, side: VerifySide) -> None:
    """Raises `TargetFailed` with the log's name if a worker fails, `WaitTimeout` after `job.verify_timeout`."""
    targets, trainers = parse_pair(topology)
    directory = _side_directory(config, topology, side)
    # An earlier verification left its checkpoints here, and a run never writes over those.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_config(
        _side_config(config, side, directory, TopologyConfig(targets=targets, trainers=trainers)),
        directory / "side.yaml",
    )
    workers = trainers + (targets if side is VerifySide.remote else 0)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    job = ["-m", "eagle_rpc", "--config-path", str(directory.resolve()), "--config-name", "side"]
    log = directory / "workers.log"
    logger.info("%s, %s target: %d workers, log in %s", topology, side.name, workers, log)
    with log.open("w") as output:
        try:
            code = subprocess.run(
                [*launcher, *job], stdout=output, stderr=output, timeout=config.job.verify_timeout
            ).returncode
        except subprocess.TimeoutExpired:
            raise WaitTimeout(
                f"{topology} {side.name} did not end within {config.job.verify_timeout:.0f} s, see {log}"
            ) from None
    if code:
        raise TargetFailed(f"{topology} {side.name} ended with code {code}, see {log}:\n{_last_lines(log)}")


def _side_directory(config: Config, topology: str, side: VerifySide) -> Path:
    return RunDirectory.of(config).path / topology / side.name


def _side_config(config: Config, side: VerifySide, directory: Path, topology: TopologyConfig) -> Config:
    """Every side has one thread a worker: bits depend on the number of threads."""
    return replace(
        config,
        job=replace(config.job, verify_side=side),
        run=replace(config.run, dir=str(directory), threads=config.run.threads or 1),
        topology=topology,
        train=replace(
            config.train, max_steps=config.job.verify_steps, max_epochs=None, log_every=1, resume=Resume.never
        ),
    )


def _last_lines(log: Path, count: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def _compare(config: Config, topology: str) -> Iterator[Comparison]:
    _, trainers = parse_pair(topology)
    for encoding in config.job.verify_encodings:
        colocated, remote = (
            [
                _read(_side_directory(config, topology, side), encoding.name, index)
                for index in range(trainers)
            ]
            for side in _SIDES
        )
        yield compare_records(topology, encoding.name, colocated, remote)


def _read(directory: Path, encoding: str, trainer: int) -> dict[str, Any]:
    return json.loads(record_path(directory, encoding, trainer).read_text())


def compare_records(
    topology: str, encoding: str, colocated: list[dict[str, Any]], remote: list[dict[str, Any]]
) -> Comparison:
    """Compares what the trainers of both sides recorded, one dict a trainer with digests and numbers by quantity."""
    equal = {
        name: [record[name] for record in colocated] == [record[name] for record in remote]
        for name in _QUANTITIES
    }
    tensors = sum(len(batch) for record in remote for batch in record["supervision"])
    rows = sum(record["rows"] for record in remote)
    return Comparison(topology, encoding, tensors, rows, equal)


def _table(comparisons: list[Comparison]) -> Iterator[str]:
    yield f"{'topology':<10}{'encoding':<10}{'tensors':>8}{'rows':>8}  " + "".join(
        f"{name:<13}" for name in _QUANTITIES
    )
    for row in comparisons:
        verdicts = "".join(f"{'bitwise' if row.equal[name] else 'DIFFERENT':<13}" for name in _QUANTITIES)
        yield f"{row.topology:<10}{row.encoding:<10}{row.tensors:>8}{row.rows:>8}  {verdicts}"
