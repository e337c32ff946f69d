import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.records import target_record

from eagle_rpc.config.schema import Config
from eagle_rpc.errors import ConnectionLost
from eagle_rpc.jobs import status
from eagle_rpc.registry import Directory, IdFile, RegistryClient, RegistryServer, load_or_create_token
from eagle_rpc.report.service_view import service_view

TARGET_STATUS = {
    "architecture": "LlamaForCausalLM",
    "hidden_size": 4096,
    "dtype": "bfloat16",
    "uptime": 7500.0,
    "draining": False,
    "queued": 3,
    "running": 1,
    "sessions": [
        {
            "id": "3fa9c1d2",
            "run": "smollm2",
            "trainer": "trainer0",
            "encoding": "hidden",
            "queued": 2,
            "lease_left": 58.2,
            "requests": 12_345,
            "tokens": 45_678_901,
            "reply_bytes_held": 12 * 2**20,
        }
    ],
    "requests": {"ok": 1234, "busy": 3, "expired": 1},
    "tokens_per_second": 12_345.6,
    "reply_bytes_per_second": 1.2345e9,
    "reply_bytes_held": 123 * 2**20,
    "max_reply_bytes": 8 * 2**30,
    "resident_bytes": 3 * 2**30,
    "device_bytes": 17 * 2**30,
}
TRAINER_STATUS = {
    "step": 40,
    "total_steps": 1000,
    "tokens_per_second": 4567.8,
    "wait_share": 0.034,
    "failovers": 2,
    "targets": [
        {
            "name": "target0",
            "incarnation": "ab" * 8,
            "state": "serving",
            "outstanding": 4,
            "seconds_per_request": 0.0453,
        }
    ],
}


def worker(name: str, status: dict[str, Any], **changes: Any) -> dict[str, Any]:
    usual = {
        "name": name,
        "run": "",
        "id": 1,
        "incarnation": "ab" * 8,
        "url": "uv://127.0.0.1:1",
        "device": "cuda:0",
        "host": "here",
        "pid": 4711,
        "seconds_silent": 0.2,
        "living": True,
        "status": status,
    }
    return {**usual, **changes}


def drawn(targets: list[dict[str, Any]], trainers: list[dict[str, Any]], width: int = 100) -> list[str]:
    look = {
        "time": 0.0,
        "registry": "the registry at 127.0.0.1:29711",
        "targets": targets,
        "trainers": trainers,
    }
    return text_of(service_view(look), width)


def text_of(view: Any, width: int = 100) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(view)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def words(lines: list[str], start: str) -> list[list[str]]:
    """Rows that begin with `start`, cut into columns."""
    return [
        [cell for cell in line.split("  ") if cell.strip()]
        for line in lines
        if line.strip().startswith(start)
    ]


def stripped(rows: list[list[str]]) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in rows]


def test_advice_follows_the_tables():
    look = {
        "time": 0.0,
        "registry": "the registry",
        "targets": [],
        "trainers": [],
        "advice": ["add a target"],
    }
    assert text_of(service_view(look))[-2:] == ["Advice", "  add a target"]


def test_a_target_is_shown_with_what_it_is_and_does():
    identity, load, session = stripped(words(drawn([worker("target0", TARGET_STATUS)], []), "target0"))
    assert identity == [
        "target0",
        "abababab",
        "serving",
        "2 h",
        "Llama 4096 bf16",
        "cuda:0",
        "3.0 GiB",
        "17.0 GiB",
        "here",
    ]
    assert load == [
        "target0",
        "1",
        "3",
        "1",
        "12.3k",
        "1,234.5",
        "123 MiB",
        "8.0 GiB",
        "1.2k",
        "busy 3, expired 1",
    ]
    assert session == [
        "target0",
        "3fa9c1d2",
        "smollm2",
        "trainer0",
        "hidden",
        "2",
        "58 s",
        "12.3k",
        "45.7M",
        "12.0 MiB",
    ]


def test_a_run_with_a_quota_is_shown_beside_it_and_one_without_is_not():
    runs = [
        {"run": "sweep", "sessions": 2, "max_sessions": 16, "queued": 3, "max_requests": None}
        | {"reply_bytes_held": 2**20, "max_reply_bytes": 2**30, "refused": 1234},
        {"run": "free", "sessions": 1, "max_sessions": None, "max_requests": None, "max_reply_bytes": None},
    ]
    lines = drawn([worker("target0", {**TARGET_STATUS, "runs": runs})], [])
    rows = words(lines[lines.index("Quotas of runs") : lines.index("Sessions")], "target0")
    assert stripped(rows) == [["target0", "sweep", "2", "16", "3", "-", "1.0 MiB", "1.0 GiB", "1.2k"]]


def test_a_trainer_is_shown_with_its_pace_and_what_it_thinks_of_targets():
    trainer, opinion = stripped(
        words(drawn([], [worker("trainer0", TRAINER_STATUS, run="smollm2")]), "trainer0")
    )
    assert trainer == ["trainer0", "abababab", "training", "smollm2", "cuda:0", "40/1,000", "4.6k", "3%", "2"]
    assert opinion == ["trainer0", "target0", "abababab", "serving", "4", "45 ms"]


def test_states_tell_the_silent_the_draining_and_the_starting_apart():
    workers = [
        worker("target0", TARGET_STATUS, living=False, seconds_silent=12.3),
        worker("target1", {**TARGET_STATUS, "draining": True}),
        worker("target2", {}),
    ]
    lines = drawn(workers, [])
    assert [stripped(words(lines, name))[0][2] for name in ("target0", "target1", "target2")] == [
        "silent 12 s",
        "draining",
        "starting",
    ]
    assert "2 targets, 0 trainers living" in lines[0]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_nothing_is_wider_than_the_terminal_and_nothing_cut_off_at_100_columns(width: int):
    lines = drawn(
        [worker("target0", TARGET_STATUS)], [worker("trainer0", TRAINER_STATUS, run="smollm2")], width
    )
    assert max(map(len, lines)) <= width
    assert width < 100 or not any("…" in line for line in lines)


def test_words_of_workers_do_not_steer_the_terminal():
    hostile = {**TARGET_STATUS, "architecture": "\x1b[2J[bold]x\n\ud800", "requests": {"\x1b]0;owned\x07": 1}}
    text = "\n".join(drawn([worker("target0", hostile)], []))
    assert "\x1b" not in text and "\x07" not in text and "?[2J[bold]x??" in text


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*TARGET_STATUS, *TRAINER_STATUS]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=5)
        | st.lists(st.integers() | st.dictionaries(st.text(), st.none())),
    )
)
def test_a_status_of_another_version_is_drawn_as_far_as_it_goes(strange):
    lines = drawn([worker("target0", strange)], [worker("trainer0", strange)], width=1000)
    assert words(lines, "target0") and words(lines, "trainer0")


def test_a_registry_without_an_answer_is_shown_as_such():
    lines = text_of(
        service_view({"time": 0.0, "registry": "the registry at here:1", "error": "ConnectionLost: gone"})
    )
    assert "the registry at here:1: no answer" in lines[0] and lines[-1] == "ConnectionLost: gone"


# --- the job


@pytest.fixture
def config(tmp_path) -> Config:
    config = Config()
    config.rpc.token_file = str(tmp_path / "token")
    load_or_create_token(Path(config.rpc.token_file))
    return config


@pytest.fixture
def registry(config, tmp_path):
    token = load_or_create_token(Path(config.rpc.token_file))
    with RegistryServer(("127.0.0.1", 0), token, Directory(IdFile(tmp_path / "ids"), ttl=60)) as server:
        config.rpc.registry = server.address
        client = RegistryClient(server.address, token)
        record = target_record(TARGET_STATUS)
        client.announce(record)
        client.announce(
            replace(record, name="trainer0", role="trainer", run="smollm2", id=2, status=TRAINER_STATUS)
        )
        yield client


def test_one_look_prints_tables(config, registry, capsys):
    assert status.run(config) == 0
    printed = capsys.readouterr().out
    assert "target0" in printed and "trainer0" in printed and "\x1b" not in printed


def test_json_is_one_object_on_one_line(config, registry, capsys):
    config.job.status_json = True
    assert status.run(config) == 0
    (line,) = capsys.readouterr().out.splitlines()
    look = json.loads(line)
    assert [one["name"] for one in look["targets"]] == ["target0"] and [
        one["run"] for one in look["trainers"]
    ] == ["smollm2"]
    assert look["targets"][0]["status"] == TARGET_STATUS and look["targets"][0]["living"]


def test_one_look_at_a_registry_that_is_not_there_raises(config):
    config.rpc.registry = "127.0.0.1:1"
    with pytest.raises(ConnectionLost, match=r"the registry at 127\.0\.0\.1:1 cannot be reached"):
        status.run(config)
