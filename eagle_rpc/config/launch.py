"""Answers for `launch.sh`: `python -m eagle_rpc.config.launch OVERRIDES` prints one line.

The line holds the number of workers of `job=train`, then the jobs to run. Without `job=` these are the whole
path, with `regenerate` only if training reads the file that it writes.
"""

import sys

from eagle_rpc.config import Config
from eagle_rpc.config.choices import JobName, MembershipKind
from eagle_rpc.config.compose import load
from eagle_rpc.errors import ConfigError


def num_workers(config: Config) -> int:
    """Processes of the torchrun of `job=train`; the targets of an elastic job are jobs of their own."""
    topology = config.topology
    if topology.single:
        return 1
    elastic = config.rpc.membership is MembershipKind.elastic
    return topology.trainers + (0 if elastic else topology.targets * topology.stages_per_target)


def jobs(config: Config, overrides: list[str]) -> list[JobName]:
    """The job that `overrides` name, or those of the whole path."""
    if any(override.startswith("job=") for override in overrides):
        return [config.job.name]
    path = [JobName.regenerate, JobName.train, JobName.export, JobName.evaluate]
    return path if config.data.train_path == config.regenerate.output else path[1:]


def main(overrides: list[str]) -> None:
    """Prints the line, or a mistake and exits with 1."""
    try:
        config = load(*overrides)
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
    sys.stdout.write(
        " ".join([str(num_workers(config)), *(job.name for job in jobs(config, overrides))]) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
