"""The start of a worker process. Imports torch, so `eagle_rpc.process` itself does not import this file."""

import os
from pathlib import Path

import torch
from transformers.utils.logging import disable_default_handler, disable_progress_bar, enable_propagation

from eagle_rpc.config.choices import LogFormat
from eagle_rpc.config.schema import Config
from eagle_rpc.process.environment import keep_compiled_code
from eagle_rpc.process.logs import setup_logging


def start_worker(config: Config, name: str, *, workers_on_host: int = 1) -> None:
    """Sets up the log, the place of compiled code and the number of threads; the first step of every worker.

    The log goes to stderr and to `logs/NAME.log` in `run.dir`, compiled code below `run.cache_dir`. With
    `run.threads` 0 the `workers_on_host` workers share the cores evenly.
    """
    log, log_format = Path(config.run.dir) / "logs" / f"{name}.log", config.run.log_format
    setup_logging(name, log, log_format=log_format)
    if log_format is LogFormat.json:
        # Otherwise transformers writes its warnings to stderr by itself.
        disable_default_handler()
        enable_propagation()
    # transformers would draw a bar for a second of weight loading; the log says which model is loaded.
    disable_progress_bar()
    keep_compiled_code(Path(config.run.cache_dir) / "compiled")
    torch.set_num_threads(config.run.threads or max(1, available_cores() // workers_on_host))


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
