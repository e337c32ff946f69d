"""Shows a running service as its registry knows it: once, or again and again."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

from eagle_rpc.config import Config
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.process import stop_signals
from eagle_rpc.process.logs import setup_logging
from eagle_rpc.registry import RegistryClient, Sighting, load_token
from eagle_rpc.report.service_view import failed_view, service_view

# A pipe has no width of its own, and nothing should be cut off there.
_PIPE_COLUMNS = 200


def run(config: Config) -> int:
    """Returns 0, with `job.status_watch` once it is told to stop. One look at a registry that does not answer raises."""
    setup_logging("status")
    client = RegistryClient(config.rpc.registry, load_token(Path(config.rpc.token_file)))
    with stop_signals() as stop:
        if config.job.status_watch == 0:
            _print(look(client), as_json=config.job.status_json)
        elif config.job.status_json or not sys.stdout.isatty():
            for seen in _looks(client, config.job.status_watch, stop):
                _print(seen, as_json=config.job.status_json)
        else:
            _refresh(_looks(client, config.job.status_watch, stop))
    return 0


def look(client: RegistryClient) -> dict[str, Any]:
    """The service at this moment as one JSON object: `targets` and `trainers`, each a record with `seconds_silent` and `living`."""
    sightings = client.records()
    return {
        "time": time.time(),
        "registry": str(client),
        "targets": [_flat(one) for one in sightings if one.record.role == "target"],
        "trainers": [_flat(one) for one in sightings if one.record.role == "trainer"],
    }


def _flat(sighting: Sighting) -> dict[str, Any]:
    record = sighting.record
    return {
        "name": record.name,
        "job": record.job,
        "id": record.id,
        "incarnation": record.incarnation,
        "url": record.url,
        "device": record.device,
        "host": record.host,
        "pid": record.pid,
        "seconds_silent": sighting.seconds_silent,
        "living": sighting.living,
        "status": record.status,
    }


def _looks(client: RegistryClient, interval: float, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """A look every `interval` seconds until `stop`; what keeps the registry from answering is a look as well."""
    while not stop.is_set():
        try:
            yield look(client)
        except EagleRpcError as error:
            yield {"time": time.time(), "registry": str(client), "error": f"{type(error).__name__}: {error}"}
        stop.wait(interval)


def _view(seen: dict[str, Any]) -> RenderableType:
    return failed_view(seen) if "error" in seen else service_view(seen)


def _print(seen: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(seen) + "\n")
        sys.stdout.flush()
    else:
        Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False).print(_view(seen))


def _refresh(looks: Iterator[dict[str, Any]]) -> None:
    """In place, on the terminal's other screen, which leaves what was there before untouched."""
    with Live(console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        for seen in looks:
            live.update(_view(seen), refresh=True)
