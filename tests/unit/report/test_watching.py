"""Prometheus metrics and OpenTelemetry spans through their own libraries; skipped where these are absent."""

import json
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from eagle_rpc.errors import ConfigError
from eagle_rpc.report.prometheus import offered, target_metrics, trainer_metrics
from eagle_rpc.report.spans import Spans
from eagle_rpc.report.trackers import require_library

DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana.json"
COUNTS = "tokens answer_tokens reply_bytes passes busy_seconds queued running reply_bytes_held".split()
STATUS = {
    **dict.fromkeys((*COUNTS, "resident_bytes", "device_bytes"), 7),
    "requests": {"ok": 3, "busy": 1},
    "request_seconds": {"queue": 0.5, "forward": 2.0, "encode": 0.25},
    "sessions": [{}, {}],
}
TRAINER = {
    "step": 4,
    "total_steps": 9,
    "tokens_per_second": 100.0,
    "failovers": 1,
    "targets": [{"name": "target0", "outstanding": 2}],
}


def all_metrics():
    yield from target_metrics(STATUS)
    yield from trainer_metrics(TRAINER, requests=5, times={"wire": 1.5}, waits={"transfer": 1.0})


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_prometheus_reads_the_present_figures_on_loopback_until_the_end():
    pytest.importorskip("prometheus_client")
    port = free_port()
    with offered(port, all_metrics):
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20).read().decode()
        # A wildcard address would have taken the port of all others.
        with socket.socket() as other:
            other.bind(("127.0.0.2", port))
    for line in (
        'eagle_rpc_target_requests_total{outcome="busy"} 1.0',
        'eagle_rpc_target_request_seconds_total{part="forward"} 2.0',
        "eagle_rpc_target_sessions 2.0",
        'eagle_rpc_trainer_request_seconds_total{part="wire"} 1.5',
        'eagle_rpc_trainer_waited_seconds_total{for="transfer"} 1.0',
        "eagle_rpc_trainer_total_steps 9.0",
        'eagle_rpc_trainer_outstanding{target="target0"} 2.0',
    ):
        assert f"\n{line}\n" in page
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20)


def test_a_port_in_use_is_told_with_its_setting():
    pytest.importorskip("prometheus_client")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with (
            pytest.raises(ConfigError, match=r"report\.prometheus_port must leave port"),
            offered(other.getsockname()[1], all_metrics),
        ):
            pass


def test_the_dashboard_asks_for_metrics_that_exist():
    known = {one.name for one in all_metrics()}
    queries = [panel["targets"][0]["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    asked = {name for query in queries for name in re.findall(r"eagle_rpc_\w+", query)}
    assert asked and asked <= known


def test_a_request_is_a_trace_whose_parts_follow_each_other(tmp_path):
    pytest.importorskip("opentelemetry.sdk")
    path = tmp_path / "run" / "spans.jsonl"
    spans = Spans(path, worker="trainer0")
    for number in range(2):
        spans.write("request", 10.0, {"queue": 0.5, "wire": 0.0}, {"eagle_rpc.request": f"r{number}"})
    spans.close()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [one["name"] for one in written] == ["queue", "wire", "request"] * 2
    queue, wire, whole = written[:3]
    assert queue["parent_id"] == wire["parent_id"] == whole["context"]["span_id"]
    assert queue["end_time"] == wire["start_time"] == whole["end_time"]
    assert queue["start_time"] == whole["start_time"] < whole["end_time"]
    assert whole["attributes"] == {"eagle_rpc.request": "r0"}
    assert whole["resource"]["attributes"]["service.instance.id"] == "trainer0"
    assert len({one["context"]["trace_id"] for one in written}) == 2


def test_an_absent_library_is_told_with_its_extra():
    require_library("report.spans", "json", extra="any")
    for library in ("no_such_library", "no_such_library.inside"):
        with pytest.raises(ConfigError, match=r"report\.spans needs .* 'eagle-rpc\[opentelemetry\]'"):
            require_library("report.spans", library, extra="opentelemetry")
