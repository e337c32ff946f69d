"""What every job does first: log, choose threads and a device."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from eagle_rpc.config import Config
from eagle_rpc.errors import ConnectionLost, NameTaken, TargetUnavailable, WaitTimeout
from eagle_rpc.process import World, keep_compiled_code
from eagle_rpc.process.logs import setup_logging
from eagle_rpc.topology import Cast, DevicePlan, plan_devices, resolve_device
from eagle_rpc.train import RunDirectory

logger = logging.getLogger(__name__)


def run_directory(config: Config) -> RunDirectory:
    return RunDirectory(Path(config.run.dir))


def start_worker(config: Config, name: str, *, workers_on_host: int = 1) -> None:
    """Logs under `name` to stderr and the run directory; divides the cores between the workers of this host.

    Compiled code is kept below `run.cache_dir`.
    """
    setup_logging(name, run_directory(config).log_file(name))
    # Of its weight loading, which takes a second; the log says what is loaded.
    disable_progress_bar()
    keep_compiled_code(Path(config.run.cache_dir) / "compiled")
    torch.set_num_threads(config.run.threads or max(1, available_cores() // workers_on_host))


@contextlib.contextmanager
def ended_by(stop: threading.Event) -> Iterator[None]:
    """A wait that fails after `stop` was set says only what the worker was waiting for; any other error is one."""
    try:
        yield
    except (ConnectionLost, NameTaken, TargetUnavailable, WaitTimeout) as error:
        if not stop.is_set():
            raise
        logger.warning("stopped while it waited: %s", error)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def planned_devices(config: Config, cast: Cast, world: World) -> DevicePlan:
    """Where this worker of a static job computes, and how its GPU reaches its peers'."""
    return plan_devices(
        cast,
        world,
        target=config.target.device,
        trainer=config.train.device,
        num_gpus=torch.cuda.device_count(),
    )


def only_device(setting: str) -> torch.device:
    """The device of a job of one process."""
    return torch.device(resolve_device(setting, local_rank=0, num_gpus=torch.cuda.device_count()))
