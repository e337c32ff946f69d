"""Command line: compose the configuration, check it, import the job that it names, run it.

Nothing heavy is imported before the configuration is known to be good.
"""

import gc
import importlib
import logging
import os
import signal
import sys
from itertools import pairwise
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from eagle_rpc.config.choices import JobName, LogFormat
from eagle_rpc.config.compose import conf_dir, refusal, register_schema, to_config
from eagle_rpc.config.overrides import for_hydra
from eagle_rpc.config.schema import Config
from eagle_rpc.config.sweeps import is_sweep, read_sweep
from eagle_rpc.config.usage import usage
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.process import die_with_parent, read_world
from eagle_rpc.process.ending import end_with
from eagle_rpc.process.logs import setup_logging
from eagle_rpc.process.signals import on_interrupt
from eagle_rpc.topology import worker_name

# Their first output comes at once.
_QUICK_JOBS = (JobName.drain, JobName.plan, JobName.registry, JobName.report, JobName.status)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def _run(composed: DictConfig) -> None:
    # Hydra drops return values and prints its own advice for exceptions, so the outcome leaves as SystemExit.
    config = None
    try:
        config = to_config(composed)
        _say_what_loads(config)
        job = importlib.import_module(f"eagle_rpc.jobs.{config.job.name.value}")
        with on_interrupt(signal.default_int_handler):
            sys.exit(job.run(config))
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:  # noqa: BLE001 - every error ends in words
        end_with(error, config)


def _say_what_loads(config: Config) -> None:
    """A first line before imports that take seconds. Raises `ConfigError` for a wrong number of workers."""
    name = worker_name(config, read_world())
    slow, as_json = config.job.name not in _QUICK_JOBS, config.run.log_format is LogFormat.json
    if slow or as_json:
        # In JSON, the last words of a quick job are an object as well.
        setup_logging(name, log_format=config.run.log_format)
    if slow:
        target = "a random target" if config.target.random else config.target.model
        logging.getLogger(__package__).info(
            "loading PyTorch and transformers for job=%s of %s", config.job.name.value, target
        )


def _run_sweep(words: list[str]) -> NoReturn:
    """Ends the process with the code of the sweep."""
    try:
        sweep = read_sweep(words)
        if read_world().launched:
            die_with_parent()
        job = importlib.import_module("eagle_rpc.jobs.sweep")
        with on_interrupt(signal.default_int_handler):
            sys.exit(job.run(sweep))
    except Exception as error:  # noqa: BLE001 - every error ends in words
        end_with(error)


def main() -> None:
    """Entry of `python -m eagle_rpc` and of the console script `eagle-rpc`. Exits with the job's code."""
    if {"-h", "--help"} & set(sys.argv):
        sys.stdout.write(usage())
        return
    with on_interrupt(signal.SIG_DFL):
        if is_sweep(sys.argv[1:]):
            _run_sweep(sys.argv[1:])
        _run_job()


def _run_job() -> None:
    register_schema()
    typed = list(sys.argv)
    sys.argv[1:] = map(for_hydra, typed[1:])
    # Hydra otherwise prints its own version of every exception and hides the exception itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if read_world().launched:
            die_with_parent()
        _run()
    except EagleRpcError as error:
        end_with(error)
    except (HydraException, OmegaConfBaseException) as error:
        # Flags and their values are Hydra's.
        words = [word for before, word in pairwise(typed) if "-" not in (before[:1], word[:1])]
        end_with(refusal(error, words))
    finally:
        # Python's last collections would walk all of torch, for seconds on a busy host, just before the end.
        gc.freeze()


if __name__ == "__main__":
    main()
