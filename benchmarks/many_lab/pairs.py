"""Part 3: tensors from GPU to GPU between pairs of processes, all pairs at once, by RPC, by NCCL and by peer copies.

torchrun --nproc-per-node=CARDS -m many_lab.pairs cuda|cpu OUT.json BYTES...      (started by `many_lab.scripts`)

Process 2i sends to process 2i + 1, each with a GPU of its own; on a CPU gloo stands for NCCL. Torch's RPC is
measured by itself, without this package around it, with several requests under way. Peer copies are those of one
process over all pairs. GB/s of all pairs together, and of the slowest pair.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from processes import free_port
from torch import Tensor
from torch.distributed import rpc

from eagle_rpc.process import bind_to_interface

_UNDER_WAY = 4
_WARM_UP = 2
# Of each size on a GPU as many messages as make so many bytes, within bounds.
_BYTES, _FEWEST, _MOST = 2**33, 8, 400
_MESSAGES_ON_CPU = 6
_SECONDS = 120.0

_sent: dict[int, Tensor] = {}


def tensor_of(num_bytes: int) -> Tensor:
    """At the sender: the same tensor for each request of this size."""
    return _sent[num_bytes]


def main() -> None:
    kind, path, sizes = sys.argv[1], Path(sys.argv[2]), [int(word) for word in sys.argv[3:]]
    bind_to_interface("lo")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    for num_bytes in sizes:
        _sent[num_bytes] = torch.full((num_bytes,), rank + 1, dtype=torch.uint8, device=device)
    _start_rpc(rank, world, device)
    table = []
    for num_bytes in sizes:
        messages = _MESSAGES_ON_CPU
        if device.type == "cuda":
            messages = max(_FEWEST, min(_MOST, _BYTES // num_bytes))
        row: dict[str, float] = {"bytes": num_bytes, "messages": messages}
        for name, send in (("rpc", _by_rpc), ("collective", _by_collective)):
            rates = _of_all_pairs(partial(send, rank, num_bytes, messages, device), num_bytes * messages)
            row |= {f"{name}_gb_per_second": sum(rates), f"{name}_slowest_pair": min(rates)}
        if rank == 0:
            row["copies_gb_per_second"] = _copies(world, num_bytes, messages, device)
        dist.barrier()
        table.append(row)
    rpc.shutdown()
    if rank == 0:
        path.write_text(json.dumps({"pairs": world // 2, "sizes": table}))
    dist.destroy_process_group()


def _start_rpc(rank: int, world: int, device: torch.device) -> None:
    port = [free_port() if rank == 0 else 0]
    dist.broadcast_object_list(port)
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"tcp://127.0.0.1:{port[0]}", rpc_timeout=_SECONDS, num_worker_threads=2 * _UNDER_WAY
    )
    if device.type == "cuda":
        options.set_device_map(f"pair{rank ^ 1}", {rank: rank ^ 1})
    rpc.init_rpc(f"pair{rank}", rank=rank, world_size=world, rpc_backend_options=options)


def _of_all_pairs(run: Callable[[], None], num_bytes: int) -> list[float]:
    """GB/s of each pair, by the clock of its receiver, when all begin together."""
    run()
    dist.barrier()
    started = time.perf_counter()
    run()
    mine = num_bytes / (time.perf_counter() - started) / 1e9
    rates = [None] * dist.get_world_size()
    dist.all_gather_object(rates, mine)
    return [rate for rate in rates[1::2] if rate is not None]


def _by_rpc(rank: int, num_bytes: int, messages: int, device: torch.device) -> None:
    """Raises `RuntimeError` if a tensor arrives with other values."""
    if rank % 2 == 0:
        return
    sender = f"pair{rank - 1}"
    under_way: deque[torch.futures.Future[Tensor]] = deque()
    for _ in range(messages):
        under_way.append(rpc.rpc_async(sender, tensor_of, (num_bytes,)))
        if len(under_way) == _UNDER_WAY:
            under_way.popleft().wait()
    last = torch.futures.wait_all(list(under_way))[-1]
    if last.device != device or not bool((last == rank).all()):
        raise RuntimeError(
            f"the tensor of {sender} must arrive whole on {device}, got another on {last.device}"
        )


def _by_collective(rank: int, num_bytes: int, messages: int, device: torch.device) -> None:
    tensor = _sent[num_bytes] if rank % 2 == 0 else torch.empty_like(_sent[num_bytes])
    for _ in range(messages):
        dist.send(tensor, rank + 1) if rank % 2 == 0 else dist.recv(tensor, rank - 1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copies(world: int, num_bytes: int, messages: int, device: torch.device) -> float:
    """GB/s of copies by this process alone, each pair on a stream of its own."""
    places = [torch.device("cuda", number) if device.type == "cuda" else device for number in range(world)]
    tensors = [torch.ones(num_bytes, dtype=torch.uint8, device=place) for place in places]
    on_gpus = device.type == "cuda"
    streams = [torch.cuda.Stream(place) for place in places[1::2]] if on_gpus else [None] * (world // 2)

    def run(count: int) -> None:
        for _ in range(count):
            for pair, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    tensors[2 * pair + 1].copy_(tensors[2 * pair], non_blocking=True)
        for stream in streams:
            if stream is not None:
                stream.synchronize()

    run(_WARM_UP)
    started = time.perf_counter()
    run(messages)
    return len(streams) * messages * num_bytes / (time.perf_counter() - started) / 1e9


if __name__ == "__main__":
    # Requests name `tensor_of` by its module, which must be the one whose tensors are there.
    from many_lab import pairs

    pairs.main()
