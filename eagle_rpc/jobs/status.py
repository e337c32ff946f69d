"""`job=status`: shows a running service as its registry knows it, once or repeatedly."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from eagle_rpc.config import Config
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.process import stop_signals
from eagle_rpc.process.logs import setup_logging
from eagle_rpc.registry import RegistryClient, load_token
from eagle_rpc.registry.record import sighting_to_json
from eagle_rpc.report.advice import on_service
from eagle_rpc.report.service_view import service_view

# A pipe has no width of its own; nothing is cut off at this one.
_PIPE_COLUMNS = 200


def run(config: Config) -> int:
    """Returns 0; with `job.status_watch` once it is told to stop. A single look raises without a registry."""
    setup_logging("status", log_format=config.run.log_format)
    client = RegistryClient(config.rpc.registry, load_token(Path(config.rpc.token_file)))
    as_json = config.job.status_json
    with stop_signals() as stop:
        if config.job.status_watch == 0:
            _print(look_at(client), as_json=as_json)
        elif as_json or not sys.stdout.isatty():
            for look in _looks(client, config.job.status_watch, stop):
                _print(look, as_json=as_json)
        else:
            _refresh(_looks(client, config.job.status_watch, stop))
    return 0


def look_at(client: RegistryClient) -> dict[str, Any]:
    """The service now as one JSON object: `time`, `registry`, `targets`, `stages`, `trainers` and `advice`.

    A worker is its record with `seconds_silent` and `living`.
    """
    workers = [sighting_to_json(one) for one in client.records()]
    roles = {
        f"{role}s": [one for one in workers if one["role"] == role] for role in ("target", "stage", "trainer")
    }
    targets, trainers = (
        [one["status"] for one in roles[role] if one["living"]] for role in ("targets", "trainers")
    )
    advice = list(on_service(targets, trainers))
    return {"time": time.time(), "registry": str(client), **roles, "advice": advice}


def _looks(client: RegistryClient, interval: float, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """A look every `interval` seconds until `stop`; without the registry it is an `error`."""
    while not stop.is_set():
        try:
            yield look_at(client)
        except EagleRpcError as error:
            yield {"time": time.time(), "registry": str(client), "error": f"{type(error).__name__}: {error}"}
        stop.wait(interval)


def _print(look: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(look) + "\n")
        sys.stdout.flush()
    else:
        Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False).print(
            service_view(look)
        )


def _refresh(looks: Iterator[dict[str, Any]]) -> None:
    """Redraws in place, on the terminal's alternate screen, which keeps the earlier output."""
    with Live(console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        for look in looks:
            live.update(service_view(look), refresh=True)
