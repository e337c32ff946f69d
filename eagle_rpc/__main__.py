"""Command line: compose the configuration, check it, import the job that it names, run it.

Nothing heavy is imported before the configuration is known to be good.
"""

import gc
import importlib
import logging
import os
import sys
from itertools import pairwise

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from eagle_rpc.config.compose import conf_dir, refusal, register_schema, to_config
from eagle_rpc.config.overrides import for_hydra
from eagle_rpc.config.usage import usage
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.process import die_with_parent, read_world


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def _run(composed: DictConfig) -> None:
    # Hydra drops return values and prints its own advice for exceptions, so the outcome leaves as SystemExit.
    try:
        config = to_config(composed)
        job = importlib.import_module(f"eagle_rpc.jobs.{config.job.name.value}")
        sys.exit(job.run(config))
    except EagleRpcError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit("interrupted")


def main() -> None:
    """Entry of `python -m eagle_rpc` and of the console script `eagle-rpc`. Exits with the job's code."""
    if {"-h", "--help"} & set(sys.argv):
        sys.stdout.write(usage())
        return
    if read_world().launched:
        die_with_parent()
    register_schema()
    typed = sys.argv[1:]
    sys.argv[1:] = map(for_hydra, typed)
    # Hydra otherwise prints its own version of every exception and hides the exception itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        _run()
    except (HydraException, OmegaConfBaseException) as error:
        # Flags and their values are Hydra's.
        words = [word for before, word in pairwise(['', *typed]) if "-" not in (before[0], word[0])]
        _fail(refusal(error, words))
    finally:
        # Python's last collections would walk all of torch, for seconds on a busy host, just before the end.
        gc.freeze()


def _fail(error: EagleRpcError) -> None:
    logging.getLogger(__package__).error("%s: %s", type(error).__name__, error)
    sys.exit(1)


if __name__ == "__main__":
    main()
