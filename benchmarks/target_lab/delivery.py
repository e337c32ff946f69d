"""A target and a trainer process on one device: what the trainer gets over RPC against what the target makes by itself.

python -m target_lab.delivery target|trainer SPEC.json      (started by `deliver`)
"""

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from device_measuring import synchronise
from peers.ours import compose
from peers.processes import Command, free_port, running, static_environment

from eagle_rpc.client import SERVICE_NAME
from eagle_rpc.config import Config
from eagle_rpc.jobs.assembly import connect_target
from eagle_rpc.jobs.permissions import static_permissions
from eagle_rpc.jobs.train import DONE, READY
from eagle_rpc.process import read_world
from eagle_rpc.process.startup import start_worker
from eagle_rpc.rpc import host, join_static, withdraw
from eagle_rpc.service.endpoint import CONTROL_METHODS, TargetEndpoint
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import ENCODINGS
from eagle_rpc.target.loading import load_target_config
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.topology import assign_roles, plan_devices
from target_lab.serving import served_rate
from target_lab.work import SHAPES, full_batch, fused_kernels, make_mapping, make_model

_WARM_UP = 4  # requests


def deliver(shape: str, encoding: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs both processes and returns what they found. Everything is supervised; nothing else runs on the device."""
    compiled = any(system.startswith("compiled") for system in options.systems)
    fused = fused_kernels(options.systems)
    with tempfile.TemporaryDirectory(prefix="delivery-") as directory:
        spec = {
            "directory": directory,
            "shape": shape,
            "attention": options.attention[0],
            "device": options.device,
            "size": options.deliver_size,
            "requests": options.requests,
            "overrides": [
                *architecture_overrides("target.random", SHAPES[shape]),
                f"target.attention={options.attention[0]}",
                f"target.chunk_rows={options.chunk_rows[0]}",
                *(f"target.{name}={used}" for name, used in fused.items()),
                f"target.compile_shapes=[{options.deliver_size if compiled else ''}]",
                f"target.compile_mode={options.compile_mode}",
                f"supervision={encoding}",
                "supervision.rows=loss_mask",
                f"supervision.prefetch={options.prefetch}",
                f"target.device={options.device}",
                f"train.device={options.device}",
                f"run.dir={directory}/run",
                # As many replies as requests are under way.
                f"target.max_reply_bytes={2**33}",
                f"target.max_reply_bytes_per_session={2**33}",
                "rpc.model_timeout=500",
                "run.threads=1",
            ],
        }
        path = Path(directory) / "spec.json"
        path.write_text(json.dumps(spec))
        port, commands = free_port(), []
        for rank, role in enumerate(("target", "trainer")):
            argv = [sys.executable, "-m", "target_lab.delivery", role, str(path)]
            commands.append(Command(role, argv, static_environment(rank, 2, port), answers=role == "trainer"))
        with running(commands[:1], commands[1], Path(directory)) as (_, trainer):
            found = trainer.ask(go=True)
        found |= json.loads((Path(directory) / "server.json").read_text())
    figures = {
        "delivered": encoding,
        "shape": shape,
        "size": options.deliver_size,
        "compiled": compiled,
        **fused,
    }
    share = found["trainer_tokens_per_second"] / found["server_tokens_per_second"]
    gigabytes = found["trainer_tokens_per_second"] * found["wire_bytes_per_token"] / 1e9
    return {**figures, **found, "share_of_server": share, "gigabytes_per_second": gigabytes}


def architecture_overrides(path: str, fields: dict[str, Any]) -> Iterator[str]:
    """One for each field, nested ones too."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from architecture_overrides(f"{path}.{name}", value)
        else:
            yield f"++{path}.{name}={json.dumps(value)}"


def serve_target(spec: dict[str, Any], config: Config, device: torch.device, membership: Any) -> None:
    """Measures the target by itself, then serves until the trainer is done."""
    model = make_model(spec["shape"], spec["attention"], device)
    target = HFEagle3TargetModel(
        model, fused_rows=config.target.fused_rows, fused_mlp=config.target.fused_mlp
    )
    if config.target.compile_shapes:
        target.compile(config.target.compile_shapes, packed=False, mode=config.target.compile_mode)
    tokens = full_batch(*map(int, spec["size"].split("x")), target.model.config.vocab_size, 1.0, device)
    rate = served_rate(
        target,
        tokens,
        make_mapping(target.model.config),
        encoding=config.supervision.encoding.value,
        chunk_rows=config.target.chunk_rows,
        requests=spec["requests"],
        device=device,
    )
    (Path(spec["directory"]) / "server.json").write_text(json.dumps({"server_tokens_per_second": rate}))
    server = TargetModelServer(target, config.target)
    host(SERVICE_NAME, TargetEndpoint(server), CONTROL_METHODS)
    membership.mark(READY)
    membership.wait_for(("trainer0",), DONE, timeout=config.rpc.model_timeout)
    server.wait_sent(config.rpc.drain_timeout)
    withdraw(SERVICE_NAME)
    server.close()


def use_target(
    spec: dict[str, Any], config: Config, device: torch.device, membership: Any, cast: Any
) -> None:
    """Takes supervision as fast as it comes, once it is told to, and answers how fast that was."""
    membership.wait_for(cast.target_names, READY, timeout=config.rpc.model_timeout)
    target_config = load_target_config(config.target, cache_dir=config.run.cache_dir)
    batch, length = map(int, spec["size"].split("x"))
    tokens = full_batch(batch, length, target_config.vocab_size, 1.0, torch.device("cpu"))
    mapping = make_mapping(target_config)
    with contextlib.closing(
        connect_target(config, target_config, None, device, cast, membership, threading.Event())
    ) as target:
        target.open_session(mapping)
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()
        started, rows = 0.0, 0
        for number, answer in enumerate(target.stream([tokens] * (_WARM_UP + spec["requests"]))):
            synchronise(device)
            rows = answer.supervised_rows.numel()
            if number == _WARM_UP - 1:
                started = time.perf_counter()
        seconds = time.perf_counter() - started
        wire = ENCODINGS[config.supervision.encoding.value].bytes_per_token(
            hidden_size=target_config.hidden_size,
            draft_vocab_size=len(mapping),
            dtype_bytes=2,
            supervised_share=rows / (batch * length),
        )
        found = {
            "trainer_tokens_per_second": spec["requests"] * batch * length / seconds,
            "wire_bytes_per_token": wire,
        }
        print(json.dumps(found), flush=True)
    membership.mark(DONE)


def main() -> None:
    role, spec = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    config = compose(spec["overrides"])
    world = read_world()
    cast = assign_roles(config.topology, world)
    start_worker(config, cast.me.name)
    devices = plan_devices(cast, world, target=config.target.device, trainer=config.train.device)
    device = torch.device(devices.device)
    if device.type == "cuda":
        # Before RPC, which looks for devices when it starts.
        torch.zeros(1, device=device)
    with join_static(cast, world, config.rpc, devices, static_permissions(config.rpc)) as membership:
        if role == "target":
            serve_target(spec, config, device, membership)
        else:
            use_target(spec, config, device, membership, cast)


if __name__ == "__main__":
    main()
