"""Real worker processes for tests: what torchrun would start, without torchrun's start-up time."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

from eagle_rpc.config.schema import RpcConfig

# Short bounds: a test that hangs should fail soon.
TEST_RPC = RpcConfig(start_timeout=60, model_timeout=60, request_timeout=30, shutdown_timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_workers(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Calls `function(*args)` in `size` processes that see torchrun's environment; returns their values in rank order.

    Raises `AssertionError` with the traceback of the first worker that raised, died or did not end in time.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    workers = []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, rank, size, port, function, args))
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
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        ROLE_NAME="default",
        ROLE_RANK=str(rank),
        ROLE_WORLD_SIZE=str(size),
        GROUP_WORLD_SIZE="1",
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_MAX_RESTARTS="0",
        TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_USE_AGENT_STORE="False",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        sender.send((True, function(*args)))
    except BaseException:  # noqa: BLE001 - whatever went wrong, the parent has to show it
        sender.send((False, traceback.format_exc()))
