"""Functions in the processes of one job, as torchrun would start them, without torchrun's start-up time."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
from support.processes import free_port, torchrun_environment

from eagle_rpc.config.schema import RpcConfig

# Processes are forked from a server that has imported everything once: an import of torch and transformers
# takes seconds.
forking = multiprocessing.get_context("forkserver")
forking.set_forkserver_preload(["support.preloaded"])

# Short bounds, in seconds: a test that hangs fails soon.
TEST_RPC = RpcConfig(start_timeout=60, model_timeout=60, request_timeout=30, shutdown_timeout=30)


def run_workers(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Calls `function(*args)` in `size` processes with torchrun's environment; returns the values in rank
    order.

    Raises `AssertionError` with the traceback of the first worker that raised, died or did not end in time.
    """
    port = free_port()
    workers = []
    for rank in range(size):
        receiver, sender = forking.Pipe(duplex=False)
        process = forking.Process(target=_work, args=(sender, rank, size, port, function, args))
        process.start()
        sender.close()
        workers.append((process, receiver))
    try:
        return [_result(rank, process, receiver, timeout) for rank, (process, receiver) in enumerate(workers)]
    finally:
        for process, _ in workers:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _result(rank: int, process: Any, receiver: Any, timeout: float) -> Any:
    assert receiver.poll(timeout), f"worker {rank} did not answer within {timeout} s"
    try:
        ok, value = receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"worker {rank} died with exit code {process.exitcode}") from None
    assert ok, f"worker {rank} raised:\n{value}"
    return value


def _work(
    sender: Any, rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(torchrun_environment(rank, size, port))
    torch.set_num_threads(1)
    try:
        sender.send((True, function(*args)))
    except BaseException:  # noqa: BLE001 - the parent shows every error
        sender.send((False, traceback.format_exc()))
