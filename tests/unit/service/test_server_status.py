import json

import pytest
from server_calls import WAIT, ask, error_of, open_session, send, tokens_of

from eagle_rpc.target.model import HFEagle3TargetModel

KEYS = {
    *(
        "architecture",
        "hidden_size",
        "vocab_size",
        "dtype",
        "weights_fingerprint",
        "incarnation",
        "uptime",
        "asked_seconds",
        "busy_seconds",
        "request_seconds",
        "draining",
        "paused",
    ),
    *(
        "queued",
        "running",
        "passes",
        "busy_seconds",
        "busy_share",
        "runs",
        "sessions",
        "requests",
        "tokens",
        "tokens_per_second",
        "reply_bytes",
    ),
    *("reply_bytes_per_second", "reply_bytes_held", "max_reply_bytes", "resident_bytes", "device_bytes"),
    *("prompts_waiting", "prompts_running", "answer_tokens", "answer_tokens_per_second"),
}


def test_status_says_what_the_target_is_and_what_it_did_and_json_has_its_types(serve, model, clock):
    server = serve(HFEagle3TargetModel(model), max_reply_bytes=10**6, max_reply_bytes_per_session=10**6)
    session = open_session(server, run="job", trainer="trainer0", encoding="logits")
    tokens = tokens_of()
    num_tokens = int(tokens.attention_mask.sum())
    num_bytes = sum(ask(server, session, tokens).num_bytes for _ in range(3))
    error_of(send, server, "nobody")
    # The forward thread is done with the last reply a moment after it was answered.
    assert server.drain(WAIT) == server.wait_sent(WAIT)
    clock.now += 6.0
    told = json.loads(json.dumps(server.status()))
    assert set(told) == KEYS
    info = server.model_info()
    for name in ("architecture", "hidden_size", "vocab_size", "dtype", "weights_fingerprint", "incarnation"):
        assert told[name] == getattr(info, name)
    assert told["requests"] == {"ok": 3, "unknown_session": 1}
    assert (told["tokens"], told["tokens_per_second"]) == (3 * num_tokens, 3 * num_tokens / 6)
    assert (told["reply_bytes"], told["reply_bytes_per_second"]) == (num_bytes, pytest.approx(num_bytes / 6))
    assert (told["uptime"], told["draining"], told["queued"], told["running"]) == (6.0, True, 0, 0)
    assert told["passes"] == 3
    # The clock stood still while they ran.
    assert told["asked_seconds"] == 6.0 and told["request_seconds"] == dict.fromkeys(
        ("queue", "forward", "encode"), 0.0
    )
    assert (told["reply_bytes_held"], told["max_reply_bytes"], told["device_bytes"]) == (0, 10**6, 0)
    assert 10**7 < told["resident_bytes"] < 10**11
    assert told["sessions"] == [
        {
            "id": session[:8],
            "run": "job",
            "trainer": "trainer0",
            "encoding": "logits",
            "queued": 0,
            "lease_left": 54.0,
            "requests": 3,
            "tokens": 3 * num_tokens,
            "reply_bytes_held": 0,
        }
    ]


def test_status_shows_what_waits_and_what_runs(serve, gated):
    server = serve(gated)
    busy, idle = open_session(server, run="busy"), open_session(server, run="idle")
    for _ in range(3):
        send(server, busy)
    assert gated.started.wait(WAIT)
    told = server.status()
    assert (told["queued"], told["running"]) == (2, 1)
    assert {session["id"]: session["queued"] for session in told["sessions"]} == {busy[:8]: 2, idle[:8]: 0}
    server.drain(1e-9)
    assert server.status()["draining"]
