"""What a target holds for trainers that stand still, die, ask too much or go away: real processes, large replies."""

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.waiting import until
from support.workers import TEST_RPC, run_workers
from torch import Tensor, nn

from eagle_rpc.config.schema import TargetConfig, TopologyConfig
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.process import read_world
from eagle_rpc.rpc import PendingCall, StaticMembership, host, join_static
from eagle_rpc.service.endpoint import CONTROL_METHODS, TargetEndpoint
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import DraftHead, GenerateRequest, SessionSpec, TargetOutput, TokenBatch
from eagle_rpc.topology import DevicePlan, Role, assign_roles

pytestmark = pytest.mark.rpc

MIB = 2**20
VOCAB, HIDDEN, DRAFT_VOCAB = 8192, 512, 4096
# 4 x 2048 tokens with three layers of fp32: glibc gives buffers of this size back to the system when they are
# freed.
NUM_TOKENS = 4 * 2048
REPLY_BYTES = NUM_TOKENS * 3 * HIDDEN * 4
BOUND = 5 * REPLY_BYTES + MIB
# One forward pass's own tensors, and what the allocator, torch and the connections keep.
ALLOWANCE = REPLY_BYTES + 64 * MIB
# Longer than any test: tests end leases by moving the server's clock.
LEASE = 3600.0
WAIT = 60.0


class Clock:
    """Seconds of the real clock, and those that the test adds."""

    def __init__(self) -> None:
        self.added = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.added


class WideTarget:
    """Large replies from cheap forward passes, which wait for the gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self._embedding = nn.Embedding(VOCAB, HIDDEN)

    def get_input_embeddings(self) -> nn.Embedding:
        return self._embedding

    def draft_head(self, selected_token_ids: Tensor) -> DraftHead:
        return DraftHead(weight=self._embedding.weight.detach()[selected_token_ids])

    def generate_batch(self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Any:
        assert self.gate.wait(WAIT)
        aux = torch.ones(*input_ids.shape, 3 * HIDDEN)
        return TargetOutput(aux_hidden_states=aux, last_hidden_state=aux[..., :HIDDEN], project=self._project)

    def _project(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape[0], VOCAB)


@contextlib.contextmanager
def joined() -> Iterator[StaticMembership]:
    torch.set_num_threads(1)
    cast, world = assign_roles(TopologyConfig(), read_world()), read_world()
    with join_static(cast, world, TEST_RPC, DevicePlan("cpu", {}), permissions(TEST_RPC, None)) as membership:
        yield membership


class Hosted:
    """The target's side, which also directs the trainer's process."""

    def __init__(self, membership: StaticMembership) -> None:
        self.target = WideTarget()
        self.membership = membership
        limits = {"max_reply_bytes": BOUND, "max_reply_bytes_per_session": BOUND, "session_lease": LEASE}
        self.clock = Clock()
        config = TargetConfig(model="wide", chunk_rows=8, **limits)
        self.server = TargetModelServer(self.target, config, clock=self.clock)
        host(TargetEndpoint(self.server), CONTROL_METHODS)
        self.target.gate.set()
        membership.mark("ready")
        self.reached("warm")
        self.until("the first reply is sent", lambda: self.status()["reply_bytes_held"] == 0)
        self.target.gate.clear()
        self.peak = {"resident_bytes": 0, "reply_bytes_held": 0}
        self._watching = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        membership.mark("gated")

    @property
    def trainer_pid(self) -> int:
        return int(self.membership.store.get("pid"))

    def status(self) -> dict[str, Any]:
        return self.server.status()

    def reached(self, event: str) -> None:
        self.membership.wait_for(("trainer0",), event, timeout=WAIT)

    def until(self, what: str, holds: Callable[[], bool]) -> dict[str, Any]:
        """The status once `holds` does."""
        until(holds, what, seconds=WAIT, seen=lambda: str(self.status()))
        return self.status()

    def end_leases(self) -> dict[str, Any]:
        """The status when no session is left."""
        self.clock.added += LEASE
        return self.until("the leases are over", lambda: not self.status()["sessions"])

    def idle(self) -> bool:
        status = self.status()
        return status["queued"] == status["running"] == 0

    def _watch(self) -> None:
        while not self._watching.wait(0.005):
            status = self.status()
            self.peak = {name: max(peak, status[name]) for name, peak in self.peak.items()}

    def end(self) -> None:
        self._watching.set()
        self._watcher.join()
        self.server.close()


class Trainer:
    """A trainer's side without the client: it asks whatever it likes."""

    def __init__(self, membership: StaticMembership) -> None:
        self._membership = membership
        membership.store.set("pid", str(os.getpid()))
        membership.wait_for(("target0",), "ready", timeout=WAIT)
        (target,) = membership.targets()
        self._link = membership.connect(target)
        self._incarnation = self.control("model_info").incarnation
        session = self.open(0)
        assert outcome(self.ask(session, "warm")) == "ok"
        self.control("disconnect", session)
        membership.mark("warm")
        membership.wait_for(("target0",), "gated", timeout=WAIT)

    def control(self, method: str, *arguments: Any) -> Any:
        return self._link.control(method, *arguments, timeout=WAIT).result()

    def open(self, number: int) -> str:
        """A session with a mapping of its own."""
        ids = torch.arange(number, number + DRAFT_VOCAB)
        return self.control("open_session", SessionSpec(selected_token_ids=ids, encoding="logits")).id

    def ask(self, session: str, request_id: str) -> PendingCall:
        ones = torch.ones(4, NUM_TOKENS // 4, dtype=torch.int64)
        supervised = torch.zeros_like(ones)
        supervised[:, :2] = 1
        request = GenerateRequest(
            session=session,
            incarnation=self._incarnation,
            request_id=request_id,
            tokens=TokenBatch(input_ids=ones, attention_mask=ones.clone(), loss_mask=supervised),
            seconds_left=10 * LEASE,
        )
        return self._link.call("generate", request, what=request_id, timeout=WAIT)

    def head(self, session: str) -> PendingCall:
        return self._link.call("output_embeddings", session, what="the head", timeout=WAIT)


def outcomes(calls: list[PendingCall]) -> Counter[str]:
    """Replies by outcome; none is kept."""
    calls.reverse()
    return Counter(outcome(calls.pop()) for _ in range(len(calls)))


def outcome(call: PendingCall) -> str:
    """`ok` or the code of an error."""
    try:
        value = call.result()
    except EagleRpcError as error:
        return error.code
    assert isinstance(value, DraftHead) or bool((value.aux == 1).all()), "the reply is whole"
    return "ok"


def stand_still(how_it_goes_on: int, told: str) -> Any:
    with joined() as membership:
        if not membership.cast.me.has(Role.target):
            trainer = Trainer(membership)
            session = trainer.open(1)
            calls = [trainer.ask(session, f"r{number}") for number in range(16)]
            seen = outcomes(calls)
            membership.mark("done")
            return dict(seen)
        hosted = Hosted(membership)
        before = hosted.status()
        hosted.until("all requests have arrived", lambda: hosted.status()["requests"].get("busy") == 11)
        os.kill(hosted.trainer_pid, signal.SIGSTOP)
        hosted.target.gate.set()
        stopped = hosted.until("everything is answered", hosted.idle)
        abandoned = hosted.end_leases()
        os.kill(hosted.trainer_pid, how_it_goes_on)
        all_sent = hosted.server.wait_sent(WAIT)
        after = hosted.status()
        hosted.end()
        seen = {
            "before": before,
            "stopped": stopped,
            "abandoned": abandoned,
            "after": after,
            "peak": hosted.peak,
            "sent": all_sent,
        }
        Path(told).write_text(json.dumps(seen))
        if how_it_goes_on == signal.SIGKILL:
            membership.announce_leaving()
        else:
            hosted.reached("done")


@pytest.mark.parametrize("how_it_goes_on", [signal.SIGCONT, signal.SIGKILL])
def test_replies_to_a_stopped_trainer_stay_within_the_bound_until_it_goes_on_or_dies(
    how_it_goes_on: int, tmp_path: Path
):
    told = tmp_path / "told.json"
    if how_it_goes_on == signal.SIGKILL:
        with pytest.raises(AssertionError, match="worker 1 died with exit code -9"):
            run_workers(stand_still, 2, how_it_goes_on, str(told))
    else:
        assert run_workers(stand_still, 2, how_it_goes_on, str(told))[1] == {"ok": 5, "busy": 11}
    seen = json.loads(told.read_text())
    before, stopped, abandoned, after = (seen[name] for name in ("before", "stopped", "abandoned", "after"))
    assert stopped["requests"]["ok"] == 6
    # A reply is let go of when the last of it is in the socket: the trainer stopped at one at most.
    assert 4 * REPLY_BYTES <= stopped["reply_bytes_held"] <= BOUND
    assert stopped["resident_bytes"] - before["resident_bytes"] >= 4 * REPLY_BYTES
    assert abandoned["reply_bytes_held"] == stopped["reply_bytes_held"], (
        "RPC has them still, whatever became of the session"
    )
    assert seen["sent"] and after["reply_bytes_held"] == 0
    assert seen["peak"]["resident_bytes"] - before["resident_bytes"] <= BOUND + ALLOWANCE
    assert after["resident_bytes"] - before["resident_bytes"] <= 64 * MIB


def flood(count: int) -> Any:
    with joined() as membership:
        if not membership.cast.me.has(Role.target):
            trainer = Trainer(membership)
            session = trainer.open(1)
            seen = outcomes([trainer.ask(session, f"r{number}") for number in range(count)])
            membership.mark("done")
            return dict(seen)
        hosted = Hosted(membership)
        before = hosted.status()
        hosted.target.gate.set()
        hosted.reached("done")
        all_sent = hosted.server.wait_sent(WAIT)
        after = hosted.status()
        hosted.end()
        return before, after, hosted.peak, all_sent


def test_a_flood_of_requests_stays_within_the_bound_and_each_is_answered():
    (before, after, peak, all_sent), seen = run_workers(flood, 2, 300)
    assert sum(seen.values()) == 300
    assert set(seen) == {"ok", "busy"}
    assert 0 < peak["reply_bytes_held"] <= BOUND
    assert peak["resident_bytes"] - before["resident_bytes"] <= BOUND + ALLOWANCE
    assert all_sent and after["reply_bytes_held"] == 0
    assert after["resident_bytes"] - before["resident_bytes"] <= 64 * MIB


def heads_of(trainer: Trainer, sessions: list[str]) -> Counter[str]:
    return Counter(outcome(trainer.head(session)) for session in sessions)


NUM_ABANDONED = 200
# Two tables of int64 each.
MAPPING_BYTES = (VOCAB + DRAFT_VOCAB) * 8


def abandon() -> Any:
    with joined() as membership:
        if not membership.cast.me.has(Role.target):
            trainer = Trainer(membership)
            sessions = [trainer.open(number) for number in range(NUM_ABANDONED)]
            first_heads = heads_of(trainer, sessions[:10])
            requests = [trainer.ask(session, "r") for session in sessions]
            other_heads = heads_of(trainer, sessions[10:])
            membership.mark("abandoned")
            seen = outcomes(requests)
            membership.mark("done")
            return dict(first_heads), dict(other_heads), dict(seen)
        hosted = Hosted(membership)
        before = hosted.status()
        hosted.reached("abandoned")
        crowd = hosted.status()
        hosted.end_leases()
        hosted.target.gate.set()
        hosted.until("everything is answered", hosted.idle)
        hosted.reached("done")
        all_sent = hosted.server.wait_sent(WAIT)
        after = hosted.status()
        hosted.end()
        return before, crowd, after, hosted.peak, all_sent


def test_200_abandoned_sessions_stay_within_the_bound_and_leave_nothing():
    (before, crowd, after, peak, all_sent), (first_heads, other_heads, seen) = run_workers(abandon, 2)
    assert len(crowd["sessions"]) == NUM_ABANDONED
    assert first_heads == {"ok": 10}
    assert other_heads["busy"] > 0, "heads are bounded as replies are"
    assert sum(seen.values()) == NUM_ABANDONED
    assert seen["ok"] == 1, "what ran already is finished"
    assert seen["unknown_session"] > 0, "what waited is dropped"
    assert seen["busy"] > 0
    assert peak["reply_bytes_held"] <= BOUND
    assert (
        peak["resident_bytes"] - before["resident_bytes"] <= BOUND + NUM_ABANDONED * MAPPING_BYTES + ALLOWANCE
    )
    assert all_sent and after["reply_bytes_held"] == 0 and after["sessions"] == []
    assert after["resident_bytes"] - before["resident_bytes"] <= 64 * MIB
