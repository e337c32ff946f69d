"""Spans of requests by OpenTelemetry's own library, in a file with one JSON object a line."""

import time
from collections.abc import Mapping
from pathlib import Path


class Spans:
    """One trace a request: a span of all of it, and inside it one for each of its parts."""

    def __init__(self, path: Path, *, worker: str) -> None:
        """Appends to `path`; `worker`: the process that the spans are of."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        exporter = ConsoleSpanExporter(
            out=self._file, formatter=lambda span: span.to_json(indent=None) + "\n"
        )
        resource = Resource.create({"service.name": "eagle_rpc", "service.instance.id": worker})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        # A thread of its own writes, in batches.
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("eagle_rpc")
        # Spans have the time of day, requests that of `time.monotonic`.
        self._offset = time.time() - time.monotonic()

    def write(
        self,
        name: str,
        began: float,
        parts: Mapping[str, float],
        attributes: Mapping[str, str | int],
    ) -> None:
        """A trace whose `parts`, in seconds, follow each other from `began` (of `time.monotonic`) on."""
        from opentelemetry.trace import set_span_in_context

        moment = self._nanoseconds(began)
        whole = self._tracer.start_span(name, start_time=moment, attributes=dict(attributes))
        inside = set_span_in_context(whole)
        for part, seconds in parts.items():
            span = self._tracer.start_span(part, context=inside, start_time=moment)
            moment += round(seconds * 1e9)
            span.end(end_time=moment)
        whole.end(end_time=moment)

    def _nanoseconds(self, moment: float) -> int:
        return round((moment + self._offset) * 1e9)

    def close(self) -> None:
        """Writes what is left."""
        self._provider.shutdown()
        self._file.close()
