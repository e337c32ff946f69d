"""A target and a trainer process on one device: the trainer's rate over RPC against the target's rate by
itself.

python -m target_lab.delivery target|trainer SPEC.json      (started by `deliver`)
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lines import questions, say
from measuring import size_of, synchronise
from processes import running, static_job
from shapes import SHAPES, overrides_of
from workers import compose, connected, joined

from eagle_rpc.config import Config
from eagle_rpc.jobs.train import DONE, READY
from eagle_rpc.rpc import StaticMembership, host, withdraw
from eagle_rpc.service.endpoint import CONTROL_METHODS, TargetEndpoint
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import ENCODINGS
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.model_files import load_target_shape
from target_lab.serving import served_rate
from target_lab.work import devices_of, full_batch, fused_kernels, make_mapping, make_model

_WARM_UP = 4  # requests
# As many replies as requests are under way.
_REPLY_BYTES = 2**33


def deliver(shape: str, encoding: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs both processes and returns their figures. All rows are supervised; nothing else runs on the device."""
    compiled = any(system.startswith("compiled") for system in options.systems)
    fused = fused_kernels(options.systems)
    with tempfile.TemporaryDirectory(prefix="delivery-") as directory:
        overrides = [
            *overrides_of(SHAPES[shape]),
            "target.dtype=bfloat16",
            f"target.attention={options.attention[0]}",
            f"target.chunk_rows={options.chunk_rows[0]}",
            *(f"target.{name}={used}" for name, used in fused.items()),
            f"target.compile_shapes=[{options.deliver_size if compiled else ''}]",
            f"target.compile_mode={options.compile_mode}",
            f"supervision={encoding}",
            "supervision.rows=loss_mask",
            f"supervision.prefetch={options.prefetch}",
            f"target.device={options.device}",
            f"train.device={trainer_device(options)}",
            f"topology.devices_per_target={options.devices}",
            f"run.dir={directory}/run",
            *(f"target.{name}={_REPLY_BYTES}" for name in ("max_reply_bytes", "max_reply_bytes_per_session")),
            "rpc.model_timeout=500",
            "run.threads=1",
        ]
        spec = {"shape": shape, "attention": options.attention[0], "size": options.deliver_size}
        spec |= {"directory": directory, "requests": options.requests, "overrides": overrides}
        path = Path(directory) / "spec.json"
        path.write_text(json.dumps(spec))
        target, trainer = static_job("target_lab.delivery", str(path))
        with running([target], trainer, Path(directory)) as (_, client):
            found = client.ask(go=True)
        found |= json.loads((Path(directory) / "server.json").read_text())
    figures = {"delivered": encoding, "shape": shape, "size": options.deliver_size, "compiled": compiled}
    share = found["trainer_tokens_per_second"] / found["server_tokens_per_second"]
    gigabytes = found["trainer_tokens_per_second"] * found["wire_bytes_per_token"] / 1e9
    return {**figures, **fused, **found, "share_of_server": share, "gigabytes_per_second": gigabytes}


def trainer_device(options: argparse.Namespace) -> str:
    """That of the target; of a target over several GPUs the next one, or else its last."""
    if options.device == "cpu" or options.devices == 1:
        return str(options.device)
    return f"cuda:{min(options.devices, torch.cuda.device_count() - 1)}"


def serve_target(spec: dict[str, Any], config: Config) -> None:
    """Measures the target by itself, then serves until the trainer is done."""
    with joined(config) as (membership, device):
        settings = config.target
        devices = devices_of(settings.device, config.topology.devices_per_target)
        model, spread = make_model(SHAPES[spec["shape"]], spec["attention"], devices)
        kernels = {"fused_rows": settings.fused_rows, "fused_mlp": settings.fused_mlp}
        target = HFEagle3TargetModel(model, spread=spread, **kernels)
        if settings.compile_shapes:
            target.compile(settings.compile_shapes, packed=False, mode=settings.compile_mode)
        rate = served_rate(
            target,
            full_batch(*size_of(spec["size"]), model.config.vocab_size, 1.0, device),
            make_mapping(model.config),
            encoding=config.supervision.encoding.value,
            chunk_rows=settings.chunk_rows,
            requests=spec["requests"],
            device=device,
        )
        (Path(spec["directory"]) / "server.json").write_text(json.dumps({"server_tokens_per_second": rate}))
        _host(target, config, membership)


def _host(target: HFEagle3TargetModel, config: Config, membership: StaticMembership) -> None:
    server = TargetModelServer(target, config.target)
    host(TargetEndpoint(server), CONTROL_METHODS)
    membership.mark(READY)
    membership.wait_for(membership.cast.trainer_names, DONE, timeout=config.rpc.model_timeout)
    server.wait_sent(config.rpc.drain_timeout)
    withdraw()
    server.close()


def use_target(spec: dict[str, Any], config: Config) -> None:
    """After a question takes supervision as fast as it arrives, and answers with the rate."""
    target_shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
    batch, length = size_of(spec["size"])
    tokens = full_batch(batch, length, target_shape.vocab_size, 1.0, torch.device("cpu"))
    mapping = make_mapping(target_shape)
    with joined(config) as (membership, device), connected(config, membership, device) as target:
        target.open_session(mapping)
        say(ready=True)
        next(questions())
        started, rows = 0.0, 0
        for number, answer in enumerate(target.stream([tokens] * (_WARM_UP + spec["requests"]))):
            synchronise(device)
            rows = answer.supervised_rows.numel()
            if number == _WARM_UP - 1:
                started = time.perf_counter()
        seconds = time.perf_counter() - started
        wire = ENCODINGS[config.supervision.encoding.value].bytes_per_token(
            hidden_size=target_shape.hidden_size,
            draft_vocab_size=len(mapping),
            dtype_bytes=2,
            supervised_share=rows / (batch * length),
        )
        rate = spec["requests"] * batch * length / seconds
        say(trainer_tokens_per_second=rate, wire_bytes_per_token=wire)


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[2]).read_text())
    {"target": serve_target, "trainer": use_target}[sys.argv[1]](spec, compose(spec["overrides"]))
