"""Figures of a running target or trainer for Prometheus, by its official client, on loopback only."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from eagle_rpc.errors import ConfigError

logger = logging.getLogger(__name__)

_ADDRESS = "127.0.0.1"


class Metric(NamedTuple):
    """A figure; `label` names what tells its samples apart, and samples are values by label (empty: one)."""

    name: str  # ends with _total if it only grows
    help: str
    samples: Mapping[str, float]
    label: str = ""


@contextlib.contextmanager
def offered(port: int, metrics: Callable[[], Iterable[Metric]]) -> Iterator[None]:
    """Answers `http://127.0.0.1:port/metrics` while the body runs; each question calls `metrics`.

    Raises `ConfigError` for a port that is in use.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(_Collector(metrics))
    try:
        server, thread = start_http_server(port, addr=_ADDRESS, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"report.prometheus_port must leave port {port} free on this host: {error}"
        ) from error
    logger.info("Prometheus finds the figures of this worker at http://%s:%d/metrics", _ADDRESS, port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    def __init__(self, metrics: Callable[[], Iterable[Metric]]) -> None:
        self._metrics = metrics

    def describe(self) -> list[Any]:
        """Nothing, so that registering asks for no figures."""
        return []

    def collect(self) -> Iterator[Any]:
        """The figures in the client's form."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for one in self._metrics():
            family = CounterMetricFamily if one.name.endswith("_total") else GaugeMetricFamily
            made = family(one.name, one.help, labels=[one.label] if one.label else [])
            for label, value in one.samples.items():
                made.add_metric([label] if one.label else [], value)
            yield made


def target_metrics(status: Mapping[str, Any]) -> Iterator[Metric]:
    """From a target's report about itself."""

    def one(key: str, name: str, text: str) -> Metric:
        return Metric(f"eagle_rpc_target_{name}", text, {"": status[key]})

    yield Metric(
        "eagle_rpc_target_requests_total", "Requests answered, by outcome", status["requests"], "outcome"
    )
    yield Metric(
        "eagle_rpc_target_request_seconds_total",
        "Seconds of answered requests, by part",
        status["request_seconds"],
        "part",
    )
    yield one("tokens", "tokens_total", "Tokens supervised")
    yield one("answer_tokens", "answer_tokens_total", "Tokens of answers to prompts")
    yield one("reply_bytes", "reply_bytes_total", "Bytes of replies")
    yield one("passes", "passes_total", "Forward passes")
    yield one("busy_seconds", "busy_seconds_total", "Seconds with a forward pass under way")
    yield one("queued", "queued", "Requests that wait")
    yield one("running", "running", "Requests that are computed")
    yield one("reply_bytes_held", "reply_bytes_held", "Bytes of replies promised or not yet sent")
    yield one("resident_bytes", "resident_bytes", "Physical memory of the process")
    yield one("device_bytes", "device_bytes", "Bytes allocated on GPUs")
    yield Metric("eagle_rpc_target_sessions", "Open sessions", {"": len(status["sessions"])})


def trainer_metrics(
    status: Mapping[str, Any],
    *,
    requests: int,
    times: Mapping[str, float],
    waits: Mapping[str, float],
) -> Iterator[Metric]:
    """From a trainer's report about itself and its targets, and the sums over its requests in seconds."""
    for key, text in (
        ("step", "Optimiser steps done"),
        ("total_steps", "Optimiser steps of the run"),
        ("tokens_per_second", "Tokens trained a second by all trainers, at the last line of metrics"),
    ):
        if key in status:
            yield Metric(f"eagle_rpc_trainer_{key}", text, {"": status[key]})
    yield Metric("eagle_rpc_trainer_requests_total", "Requests whose supervision was decoded", {"": requests})
    yield Metric(
        "eagle_rpc_trainer_request_seconds_total", "Seconds of these requests, by part", times, "part"
    )
    yield Metric(
        "eagle_rpc_trainer_waited_seconds_total",
        "Seconds of standing still, by what was waited for",
        waits,
        "for",
    )
    yield Metric("eagle_rpc_trainer_failovers_total", "Requests asked again", {"": status["failovers"]})
    outstanding = {one["name"]: one["outstanding"] for one in status["targets"]}
    yield Metric("eagle_rpc_trainer_outstanding", "Requests under way, by target", outstanding, "target")
