"""The rate of TensorPipe's TCP: one process asks another for tensors over loopback, beside a plain socket.

The two processes have one uv transport, as workers of this package do, and large pages. The plain socket sends
the same bytes from one buffer into another: the limit in the same run.

    unshare --net sh -c "ip link set lo up && exec python benchmarks/wire.py --out DIRECTORY"
"""

import argparse
import os
import socket
import statistics
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import processes  # It puts `support` on the path.
import torch
from support.reporting import processor, table
from support.workers import run_workers
from torch.distributed import rpc

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.process import bind_to_interface
from eagle_rpc.rpc.internals import agent_options

__all__ = ["processes"]
_MIB = 2**20
_UNDER_WAY = 4
_NAMES = ("target", "trainer")
# Of a target: channel by name, or the plain socket.
SOCKET, WAYS = "plain socket", {"TensorPipe, basic": ["basic"], "TensorPipe, mpt_uv": ["mpt_uv", "basic"]}


class Pace(NamedTuple):
    """Of one size: bytes a second, and the seconds of processor time for a gigabyte in both processes together."""

    rate: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of report.md")
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--total", type=int, default=2048, help="MiB to send for each figure")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    paces: dict[tuple[str, int], list[Pace]] = {}
    for _ in range(arguments.repetitions):
        for way in (SOCKET, *WAYS):
            found = _turn(way, arguments.mebibytes, arguments.total)
            for size, pace in zip(arguments.mebibytes, found, strict=True):
                paces.setdefault((way, size), []).append(pace)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.md").write_text(report(paces, arguments))
    print(report(paces, arguments))


def _turn(way: str, sizes: list[int], total: int) -> list[Pace]:
    """The pace of each size in MiB, `total` MiB each."""
    port = processes.free_port()
    serving, asking = run_workers(_take_part, 2, way, sizes, total, port, timeout=600)
    return [
        Pace(total * _MIB / seconds, (cpu + others) / (total * _MIB / 1e9))
        for others, (seconds, cpu) in zip(serving, asking, strict=True)
    ]


def _take_part(way: str, sizes: list[int], total: int, port: int) -> list[float] | list[tuple[float, float]]:
    """Of rank 0 the processor seconds for each size, of rank 1 the seconds and processor seconds."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if way == SOCKET:
        return (_send if rank == 0 else _receive)(sizes, total, port)
    bind_to_interface("lo")
    options = agent_options("env://", RpcConfig(channels=WAYS[way]), cuda=False)
    rpc.init_rpc(_NAMES[rank], rank=rank, world_size=2, rpc_backend_options=options)
    found = _ask(sizes, total) if rank == 1 else []
    rpc.shutdown()
    return _served if rank == 0 else found


# --- TensorPipe

_served: list[float] = []  # processor seconds of rank 0 for each size
_tensors: dict[int, torch.Tensor] = {}


def reply(size: int) -> torch.Tensor:
    """Runs at the target: the same tensor again and again, so that only the transport costs."""
    if size not in _tensors:
        _tensors[size] = torch.ones(size * _MIB, dtype=torch.uint8)
    return _tensors[size]


def begin() -> None:
    _served.append(-time.process_time())


def end() -> None:
    _served[-1] += time.process_time()


def _ask(sizes: list[int], total: int) -> list[tuple[float, float]]:
    found = []
    for size in sizes:
        rpc.rpc_sync(_NAMES[0], reply, args=(size,))
        rpc.rpc_sync(_NAMES[0], begin)
        started, cpu = time.perf_counter(), time.process_time()
        under_way: deque[torch.futures.Future[torch.Tensor]] = deque()
        for _ in range(total // size):
            if len(under_way) == _UNDER_WAY:
                under_way.popleft().wait()
            under_way.append(rpc.rpc_async(_NAMES[0], reply, args=(size,)))
        for one in under_way:
            one.wait()
        found.append((time.perf_counter() - started, time.process_time() - cpu))
        rpc.rpc_sync(_NAMES[0], end)
    return found


# --- a plain socket


def _send(sizes: list[int], total: int, port: int) -> list[float]:
    spent = []
    with socket.create_server(("127.0.0.1", port)) as server:
        connection, _ = server.accept()
    with connection:
        for size in sizes:
            buffer = bytes(size * _MIB)
            connection.recv(1)
            cpu = time.process_time()
            for _ in range(total // size):
                connection.sendall(buffer)
            spent.append(time.process_time() - cpu)
    return spent


def _receive(sizes: list[int], total: int, port: int) -> list[tuple[float, float]]:
    found = []
    with _connected(port) as connection:
        for size in sizes:
            buffer = bytearray(size * _MIB)
            connection.sendall(b"-")
            started, cpu = time.perf_counter(), time.process_time()
            for _ in range(total // size):
                view = memoryview(buffer)
                while view:
                    view = view[connection.recv_into(view) :]
            found.append((time.perf_counter() - started, time.process_time() - cpu))
    return found


def _connected(port: int) -> socket.socket:
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def report(paces: dict[tuple[str, int], list[Pace]], arguments: argparse.Namespace) -> str:
    rows = []
    for (way, size), found in paces.items():
        rates = [one.rate / 1e9 for one in found]
        limit = statistics.median(one.rate / 1e9 for one in paces[SOCKET, size])
        rate, cpu = statistics.median(rates), statistics.median(one.cpu for one in found)
        spread = f"{min(rates):.2f} to {max(rates):.2f}"
        rows.append(
            (way, size, f"{rate:.2f}", spread, f"{8 * rate:.0f}", f"{rate / limit:.2f}", f"{cpu:.2f}")
        )
    header = (
        "way",
        "MiB a reply",
        "GB/s, median",
        "range",
        "Gbit/s",
        "of the plain socket's",
        "CPU s/GB, both ends",
    )
    note = (
        f"{processor()}, {os.cpu_count()} cores; torch {torch.__version__}; {arguments.repetitions} turns of "
        f"{arguments.total} MiB, {_UNDER_WAY} requests under way; load average {os.getloadavg()[2]:.1f} at the end."
    )
    return f"{note}\n\n{table(header, rows)}\n"


if __name__ == "__main__":
    main()
