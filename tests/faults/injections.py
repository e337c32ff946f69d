"""The faults themselves: each function hits one victim and returns details for the record. `kinds.py` lists them."""

import json
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.waiting import happens, pause

from faults import rogue
from faults.connections import connections_between, listening_port, send_garbage
from faults.isolation import listening_ports, slowed_down
from faults.service import REGISTRY, TRAINER, Service, Worker
from faults.workspace import DRAIN_TIMEOUT, SHUTDOWN_TIMEOUT

Details = dict[str, Any]
# All faults hit the first target; the steady one is never ended, so its memory can be measured from start to
# end.
ENDED_TARGET, STEADY_TARGET = "target0", "target1"

# Reasons for an end inside torch itself.
GARBAGE = ("garbage", "truncated message")

# Seconds, unless named otherwise.
_STOP_SECONDS = (0.5, 6.0)
_SLOW_SECONDS, _SLOW_KILOBITS = (1.0, 4.0), (300, 2000)
_ALL_CUT_SHARE = 0.5
_ROGUE_TIMEOUT = 60.0
_AFTERMATH_SECONDS, _DEATH_SECONDS = 0.3, 60.0
_END_SECONDS = DRAIN_TIMEOUT + SHUTDOWN_TIMEOUT


@dataclass
class Context:
    """The service under test, and the promises that it broke."""

    service: Service
    observe: Callable[[], None] = lambda: None  # called often, during every wait
    violations: list[str] = field(default_factory=list)
    answers: dict[str, Counter[str]] = field(default_factory=dict)  # of targets, for each act of a rogue
    _acts: int = 0

    def pause(self, seconds: float) -> None:
        pause(seconds, self.observe)

    def kill(self, worker: Worker) -> None:
        process = worker.running
        worker.may_end = "SIGKILL"
        process.kill()
        process.ends(_DEATH_SECONDS)

    def port_of(self, worker: Worker) -> int:
        record = self.service.record_of(worker)
        if record is None:
            raise RuntimeError(f"{worker.name} must serve before a fault, the registry does not know it")
        return listening_port(record.url)

    def let_act(self, name: str, victim: Worker, draw: random.Random) -> Details:
        """Starts a rogue for one act. A wrong answer and an executed command are violations."""
        workspace = self.service.workspace
        self._acts += 1
        outcome, marker = (workspace.path / f"{kind}.{self._acts}" for kind in ("outcome", "marker"))
        act = rogue.Act(
            name=name,
            target=victim.name,
            registry=self.service.address,
            token_file=str(workspace.token),
            seed=draw.randrange(2**31),
            marker=str(marker),
            outcome=str(outcome),
        )
        log = workspace.logs / "rogue.log"
        process = self.service.zygote.fork("faults.rogue:main", act.to_arguments(), log=log)
        if not process.ends(_ROGUE_TIMEOUT, self.observe):
            process.kill()
            self.violations.append(f"{name} at {victim.name}: no answer within {_ROGUE_TIMEOUT:.0f} s")
        if marker.exists():
            self.violations.append(f"{name} at {victim.name}: a command was executed")
        if not outcome.exists():
            self.violations.append(f"{name} at {victim.name}: the rogue failed: ...\n{process.end_of_log()}")
            return {}
        found = json.loads(outcome.read_text())
        outcome.unlink()
        self.violations += [f"{name} at {victim.name}: {wrong}" for wrong in found["wrong"]]
        counted = {key: found[key] for key in ("asked", "as_promised")}
        self.answers.setdefault(name, Counter()).update(counted)
        return found


Inject = Callable[[Context, Worker, random.Random], Details]


# --- of any process


def kill(context: Context, victim: Worker, _draw: random.Random) -> Details:
    context.kill(victim)
    return {}


def terminate(context: Context, victim: Worker, _draw: random.Random) -> Details:
    """A target drains, a trainer writes a checkpoint; both end with code 0."""
    victim.may_end = "SIGTERM"
    victim.running.send(signal.SIGTERM)
    process = victim.running
    process.ends(_END_SECONDS, context.service.progress.look)
    if process.poll() != 0:
        how = "lives on" if process.alive else f"ended with code {process.poll()}"
        context.violations.append(f"{victim.name} {how} after SIGTERM: ...\n{process.end_of_log()}")
        process.kill()
    return {"code": process.poll()}


def stop(context: Context, victim: Worker, draw: random.Random) -> Details:
    seconds = draw.uniform(*_STOP_SECONDS)
    process = victim.running
    process.send(signal.SIGSTOP)
    context.pause(seconds)
    process.send(signal.SIGCONT)
    return {"seconds": seconds}


# --- of connections


def cut(context: Context, victim: Worker, draw: random.Random) -> Details:
    """One of the trainer's connections with a target, or all."""
    found = connections_between(context.service.workers[TRAINER].running.pid, victim.running.pid)
    chosen = found if draw.random() < _ALL_CUT_SHARE else draw.sample(found, min(1, len(found)))
    return {"cut": sum(connection.cut() for connection in chosen), "of": len(found)}


def slow(context: Context, victim: Worker, draw: random.Random) -> Details:
    seconds, kilobits = draw.uniform(*_SLOW_SECONDS), draw.randint(*_SLOW_KILOBITS)
    with slowed_down(context.port_of(victim), kilobits=kilobits):
        context.pause(seconds)
    return {"seconds": seconds, "kilobits": kilobits}


def garbage(context: Context, victim: Worker, draw: random.Random) -> Details:
    """On the RPC port: torch may end the process or close the port."""
    port = context.port_of(victim)
    victim.may_end = GARBAGE[0]
    return _with_aftermath(context, victim, port, {"bytes": send_garbage(port, draw)})


def truncated(context: Context, victim: Worker, draw: random.Random) -> Details:
    port = context.port_of(victim)
    victim.may_end = GARBAGE[1]
    return _with_aftermath(context, victim, port, context.let_act("truncated_messages", victim, draw))


def _with_aftermath(context: Context, victim: Worker, port: int, details: Details) -> Details:
    """A target that no longer listens must end, so that the next one can take its place."""
    process = victim.running
    look = context.service.progress.look
    process.ends(_AFTERMATH_SECONDS, look)

    def ended_or_listens() -> bool:
        return not process.alive or port in listening_ports()

    if victim.role == "target" and not happens(ended_or_listens, within=_END_SECONDS, meanwhile=look):
        context.violations.append(
            f"{victim.name} lives on without listening after {victim.may_end} ({details})"
        )
        process.kill()
    return {**details, "survived": process.alive}


def registry_garbage(context: Context, _victim: Worker, draw: random.Random) -> Details:
    return {"bytes": sum(send_garbage(context.service.port, draw) for _ in range(3))}


# --- of peers


def hostile(context: Context, victim: Worker, draw: random.Random) -> Details:
    return context.let_act("hostile_pickles", victim, draw)


def malformed(context: Context, victim: Worker, draw: random.Random) -> Details:
    return context.let_act("malformed_requests", victim, draw)


def abandon(context: Context, victim: Worker, draw: random.Random) -> Details:
    return context.let_act("abandoned_sessions", victim, draw)


# --- several at once


def outage(context: Context, victim: Worker, draw: random.Random) -> Details:
    """One target is killed while the other one is stopped: no target answers."""
    other = context.service.workers[STEADY_TARGET]
    seconds = draw.uniform(*_STOP_SECONDS)
    other.running.send(signal.SIGSTOP)
    context.kill(victim)
    context.pause(seconds)
    other.running.send(signal.SIGCONT)
    return {"seconds": seconds}


def kill_with_registry(context: Context, victim: Worker, _draw: random.Random) -> Details:
    context.kill(context.service.workers[REGISTRY])
    context.kill(victim)
    return {}


def kill_with_trainer(context: Context, victim: Worker, _draw: random.Random) -> Details:
    context.kill(context.service.workers[TRAINER])
    context.kill(victim)
    return {}
