"""The memory of a host whose trainers hold embedding and head rows: a copy each, and one for all.

    python benchmarks/host_copies.py --trainers 8 --out benchmarks/results/host_copies.json

A target with random weights serves a real elastic service; each trainer is a process that opens a session, takes
embedding and head rows as `job=train` does, and reads every value. Memory is the sum over trainers of their
proportional share (Pss of `/proc/PID/smaps_rollup`, where a page of n processes counts 1/n in each), without their
share before. Seconds are by the clock, from the first open session until all trainers have read all.
"""

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measuring import Results, arguments_of
from support.elastic import Link, Registry, Worker, remote_target, serve_target

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import VocabMapping

_MIB = 2**20
# Seconds for a worker to start, and for all of them to take and read their tensors.
_PATIENCE = 600.0


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--trainers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=131072)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--draft-vocab-size", type=int, default=32768)
    parser.add_argument("--shared-dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = Results(arguments.out, torch.device("cpu"))
    for shared_dir in (None, arguments.shared_dir):
        results.add(**measured(arguments, shared_dir))


def measured(arguments: argparse.Namespace, shared_dir: Path | None) -> dict[str, float | str]:
    """The figures of one service, with this directory of shared copies or without one."""
    workers: list[Worker] = []
    with TemporaryDirectory() as directory:
        registry = Registry(Path(directory))
        try:
            service = registry.address, registry.token
            workers.append(Worker(serve_target, "target0", target_config(arguments), *service))
            workers[0].receive(_PATIENCE)
            sizes = arguments.vocab_size, arguments.draft_vocab_size
            trainers = [
                Worker(take_and_read, f"trainer{number}", *sizes, shared_dir, *service)
                for number in range(arguments.trainers)
            ]
            workers += trainers
            for trainer in trainers:
                trainer.receive(_PATIENCE)
            before = sum(proportional_bytes(trainer) for trainer in trainers)
            started = time.perf_counter()
            for trainer in trainers:
                trainer.send("take")
            tensor_bytes = max(trainer.receive(_PATIENCE) for trainer in trainers)
            seconds = time.perf_counter() - started
            held = sum(proportional_bytes(trainer) for trainer in trainers) - before
            for trainer in trainers:
                trainer.send("leave")
                trainer.process.join(_PATIENCE)
        finally:
            for worker in workers:
                worker.end()
            registry.end()
    return {
        "shared_dir": str(shared_dir),
        "trainers": arguments.trainers,
        "tensor_mib": tensor_bytes / _MIB,
        "trainers_mib": held / _MIB,
        "copies": held / tensor_bytes,
        "seconds": seconds,
    }


def target_config(arguments: argparse.Namespace) -> TargetConfig:
    """Small layers between a large embedding and a large head."""
    shape = {
        "model_type": "llama",
        "hidden_size": arguments.hidden_size,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 1,
        "vocab_size": arguments.vocab_size,
        "max_position_embeddings": 64,
    }
    return TargetConfig(
        model="random", random=shape, dtype=DType.bfloat16, device="cpu", aux_layer_ids=[0, 2, 4]
    )


def take_and_read(
    link: Link,
    name: str,
    vocab_size: int,
    draft_vocab_size: int,
    shared_dir: Path | None,
    address: str,
    token: bytes,
) -> None:
    """A trainer; says the bytes of its tensors once it has read them, and holds them until it is ended."""
    changes = {"request_timeout": _PATIENCE, "reconnect_deadline": _PATIENCE, "shared_dir": shared_dir}
    with remote_target(name, address, token, **changes) as backend:
        link.send("connected")
        link.receive()
        backend.open_session(VocabMapping.from_token_ids(torch.arange(draft_vocab_size), vocab_size))
        tensors = [backend.input_embeddings(), backend.output_embeddings().weight]
        for tensor in tensors:
            tensor.view(torch.int16).max()
        link.send(sum(tensor.nbytes for tensor in tensors))
        link.receive_forever()


def proportional_bytes(worker: Worker) -> int:
    """Its own pages, and its share of pages that other processes map as well."""
    for line in Path(f"/proc/{worker.process.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"Linux must tell the proportional memory of process {worker.process.pid}")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
