"""What a worker shows of itself while it runs, by the section `report`: Prometheus metrics and spans."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from eagle_rpc.client import RemoteEagle3TargetModel
from eagle_rpc.client.remote import DecodedRequest
from eagle_rpc.config import Config
from eagle_rpc.report.prometheus import Metric, offered, target_metrics, trainer_metrics
from eagle_rpc.report.spans import Spans
from eagle_rpc.report.trackers import require_library
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.topology import Cast


def require_watching(config: Config) -> None:
    """Raises `ConfigError` for a library that `report` needs and that is not there."""
    if config.report.prometheus_port is not None:
        require_library("report.prometheus_port", "prometheus_client", extra="prometheus")
    if config.report.spans:
        require_library("report.spans", "opentelemetry.sdk", extra="opentelemetry")


def target_watched(
    config: Config, cast: Cast, server: TargetModelServer
) -> contextlib.AbstractContextManager[None]:
    """Offers the metrics of a target while the body runs."""
    return _metrics(config, cast, lambda: target_metrics(server.status()))


@contextlib.contextmanager
def trainer_watched(
    config: Config, cast: Cast, backend: RemoteEagle3TargetModel, status: Callable[[], dict[str, Any]]
) -> Iterator[None]:
    """Offers the metrics of a trainer, and writes the spans of its requests, while the body runs."""

    def metrics() -> Iterator[Metric]:
        totals = backend.totals
        return trainer_metrics(
            status(), requests=totals.requests, times=totals.times._asdict(), waits=totals.waits._asdict()
        )

    with _metrics(config, cast, metrics), contextlib.ExitStack() as stack:
        if config.report.spans:
            path = Path(config.run.dir) / f"spans-{cast.me.name}.jsonl"
            spans = stack.enter_context(contextlib.closing(Spans(path, worker=cast.me.name)))
            backend.when_decoded = lambda request: _write(spans, request)
        yield


def _metrics(
    config: Config, cast: Cast, metrics: Callable[[], Iterable[Metric]]
) -> contextlib.AbstractContextManager[None]:
    if config.report.prometheus_port is None:
        return contextlib.nullcontext()
    # Workers of one host have a port each.
    return offered(config.report.prometheus_port + cast.names.index(cast.me.name), metrics)


def _write(spans: Spans, request: DecodedRequest) -> None:
    attributes: dict[str, str | int] = {
        "eagle_rpc.request": request.id,
        "eagle_rpc.target": request.target,
        "eagle_rpc.reply_bytes": request.num_bytes,
    }
    spans.write("request", request.submitted, request.times._asdict(), attributes)
