"""A target's report about itself: answers and rates since its start, its load and its memory."""

import contextlib
import dataclasses
import os
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from eagle_rpc.errors import EagleRpcError, TargetFailed
from eagle_rpc.process.waiting import Clock
from eagle_rpc.service.answering import AnswerDesk
from eagle_rpc.service.quotas import Quotas
from eagle_rpc.service.rates import RecentRate
from eagle_rpc.service.reply_budget import ReplyBudget
from eagle_rpc.service.scheduler import ForwardScheduler
from eagle_rpc.service.sessions import SessionTable
from eagle_rpc.supervision import ServiceTimes

_STATM = Path("/proc/self/statm")


class Throughput:
    """Counts of requests by outcome, and of the tokens and bytes of the answers. Safe for threads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._first_request: float | None = None  # when it came
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._seconds = {field.name: 0.0 for field in dataclasses.fields(ServiceTimes)}
        self._rates = {name: RecentRate(clock) for name in ("tokens", "reply_bytes", "answer_tokens")}

    @property
    def requests(self) -> dict[str, int]:
        """Answered requests by outcome: `ok` or the code of an error."""
        with self._lock:
            return dict(self._requests)

    def note_request(self) -> None:
        """Notes the time of the first request."""
        with self._lock:
            if self._first_request is None:
                self._first_request = self._clock()

    @contextlib.contextmanager
    def refusals_counted(self) -> Iterator[None]:
        """Counts the error by which the body refuses a request."""
        try:
            yield
        except Exception as error:
            # Trainers are told an unforeseen error as `failed`.
            self.count(error.code if isinstance(error, EagleRpcError) else TargetFailed.code)
            raise

    def count(self, outcome: str, **amounts: int) -> None:
        """Counts a request that was answered: `ok` with `amounts` by name, or the code of an error."""
        with self._lock:
            self._requests[outcome] += 1
            for name, amount in amounts.items():
                self._rates[name].add(amount)

    def add_times(self, times: ServiceTimes) -> None:
        """Adds the times of an answered request."""
        with self._lock:
            for name in self._seconds:
                self._seconds[name] += getattr(times, name)

    def describe(self) -> dict[str, Any]:
        """The figures by their names in the target's status.

        `request_seconds`: sums, as `ServiceTimes`; `asked_seconds`: since the first request, 0 before it.
        """
        figures: dict[str, Any] = {"requests": self.requests}
        with self._lock:
            asked = self._first_request
            figures["asked_seconds"] = 0.0 if asked is None else self._clock() - asked
            figures["request_seconds"] = dict(self._seconds)
            for name, rate in self._rates.items():
                figures |= {name: rate.total, f"{name}_per_second": rate.per_second}
        return figures


def describe_load(
    sessions: SessionTable, scheduler: ForwardScheduler, answers: AnswerDesk, budget: ReplyBudget
) -> dict[str, Any]:
    """A target's work under way.

    `passes`: forward passes so far; `busy_seconds`: with a pass under way; `busy_share`: of the last
    ten seconds; `prompts_*`: of answers; `lease_left`: seconds; `requests`, `tokens`: of a session, answered;
    `reply_bytes_held`: promised, or made and not yet sent; `runs`: those with a session, as `_describe_runs`.
    """
    # First: it forgets the bytes that were sent.
    held = budget.held
    described = _describe_sessions(sessions, scheduler, budget)
    return {
        "draining": scheduler.draining,
        "queued": scheduler.num_queued,
        "running": scheduler.num_running,
        "passes": scheduler.num_passes,
        "busy_seconds": scheduler.busy_seconds,
        "busy_share": scheduler.busy_share,
        "prompts_waiting": answers.num_waiting,
        "prompts_running": answers.num_running,
        "reply_bytes_held": held,
        "sessions": described,
        "runs": _describe_runs(described, sessions.quotas, budget),
    }


def _describe_sessions(
    sessions: SessionTable, scheduler: ForwardScheduler, budget: ReplyBudget
) -> list[dict[str, Any]]:
    return [
        {
            "id": one.id[:8],
            "run": one.spec.run,
            "trainer": one.spec.trainer,
            "encoding": one.spec.encoding,
            "queued": scheduler.num_queued_of(one.spec.run, one.id),
            "lease_left": sessions.lease_left(one),
            "requests": one.num_requests,
            "tokens": one.num_tokens,
            "reply_bytes_held": budget.held_of(one.id),
        }
        for one in sessions
    ]


def _describe_runs(
    sessions: list[dict[str, Any]], quotas: Quotas, budget: ReplyBudget
) -> list[dict[str, Any]]:
    """What each run uses, and its quota: null where it has none. `refused`: how often it met its quota."""
    names = list(dict.fromkeys(one["run"] for one in sessions))
    refused, runs = quotas.refused(names), []
    for name in names:
        own, quota = [one for one in sessions if one["run"] == name], quotas.of(name)
        runs.append(
            {
                "run": name,
                "sessions": len(own),
                "max_sessions": quota.sessions,
                "queued": sum(one["queued"] for one in own),
                "max_requests": quota.requests,
                "reply_bytes_held": sum(one["reply_bytes_held"] for one in own),
                "max_reply_bytes": budget.quota(name),
                "refused": refused[name],
            }
        )
    return runs


def describe_memory(devices: Collection[torch.device]) -> dict[str, int]:
    """`resident_bytes`: physical memory, by Linux; `device_bytes`: allocated on GPUs, else 0."""
    gpus = {device for device in devices if device.type == "cuda"}
    return {
        "resident_bytes": int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "device_bytes": sum(torch.cuda.memory_allocated(gpu) for gpu in gpus),
    }
