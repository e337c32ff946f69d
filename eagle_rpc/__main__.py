"""Command line: compose the configuration, check it, import the job that it names, run it.

Nothing heavy is imported before the configuration is known to be good.
"""

import gc
import importlib
import logging
import sys

import hydra
from omegaconf import DictConfig

from eagle_rpc.config.compose import conf_dir, register_schema, to_config
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.process import die_with_parent, prepare_environment, read_world


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def _run(composed: DictConfig) -> None:
    # Hydra drops return values and prints its own advice for exceptions, so the outcome leaves as SystemExit.
    try:
        config = to_config(composed)
        job = importlib.import_module(f"eagle_rpc.jobs.{config.job.name.value}")
        sys.exit(job.run(config))
    except EagleRpcError as error:
        logging.getLogger(__package__).error("%s: %s", type(error).__name__, error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted")


def main() -> None:
    """Entry of `python -m eagle_rpc` and of the console script `eagle-rpc`. Exits with the job's code."""
    prepare_environment()
    if read_world().launched:
        die_with_parent()
    register_schema()
    try:
        _run()
    finally:
        # Python's last collections would walk all of torch, for seconds on a busy host; the memory goes with the process anyway.
        gc.freeze()


if __name__ == "__main__":
    main()
