"""The kinds of faults. Each hits one victim and returns what it did, for the record."""

import json
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from faults import rogue
from faults.connections import connections_between, listening_port, send_garbage
from faults.isolation import listening_ports, slowed_down
from faults.processes import wait_until
from faults.service import REGISTRY, TRAINER, Part, Service
from faults.workplace import DRAIN_TIMEOUT, SHUTDOWN_TIMEOUT

Details = dict[str, Any]
# Of targets, the first takes everything; the other one is never ended, so that its memory can be followed.
MORTAL, SURVIVOR = "target0", "target1"
_TARGETS = (MORTAL, SURVIVOR)

# Reasons of an end inside torch itself.
GARBAGE = ("garbage", "truncated message")

_STOP_SECONDS = (0.5, 6.0)
_SLOW_SECONDS, _SLOW_KILOBITS = (1.0, 4.0), (300, 2000)
_ALL_CUT_SHARE = 0.5
_ROGUE_TIMEOUT = 60.0
_AFTERMATH_SECONDS, _DEATH_SECONDS = 0.3, 5.0


@dataclass
class Scene:
    """What faults work on."""

    service: Service
    observe: Callable[[], None] = lambda: None  # to be called often, whatever else goes on
    violations: list[str] = field(default_factory=list)  # promises that were broken
    answers: dict[str, Counter[str]] = field(default_factory=dict)  # of targets to each act of rogues
    _acts: int = 0

    def pause(self, seconds: float) -> None:
        wait_until(lambda: False, seconds, self.observe)

    def kill(self, part: Part) -> None:
        process = part.running
        part.may_end = "SIGKILL"
        process.kill()
        wait_until(lambda: not process.alive, _DEATH_SECONDS)

    def port_of(self, part: Part) -> int:
        record = self.service.record_of(part)
        if record is None:
            raise RuntimeError(f"{part.name} must serve before a fault, the registry does not know it")
        return listening_port(record.url)

    def let_act(self, name: str, victim: Part, draw: random.Random) -> Details:
        """Has a rogue do its worst; a wrong answer, or a command that was executed, breaks a promise."""
        workplace = self.service.workplace
        self._acts += 1
        outcome, marker = (workplace.path / f"{what}.{self._acts}" for what in ("outcome", "marker"))
        act = rogue.Act(
            name=name,
            target=victim.name,
            registry=f"127.0.0.1:{self.service.port}",
            token_file=str(workplace.token),
            seed=draw.randrange(2**31),
            marker=str(marker),
            outcome=str(outcome),
        )
        log = workplace.logs / "rogue.log"
        process = self.service.zygote.fork("faults.rogue:main", act.to_arguments(), log=log)
        if not wait_until(lambda: not process.alive, _ROGUE_TIMEOUT, self.observe):
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


Inject = Callable[[Scene, Part, random.Random], Details]


# --- of any process


def kill(scene: Scene, victim: Part, _draw: random.Random) -> Details:
    scene.kill(victim)
    return {}


def terminate(scene: Scene, victim: Part, _draw: random.Random) -> Details:
    """A target drains, a trainer writes a checkpoint; both end with code 0."""
    victim.may_end = "SIGTERM"
    victim.running.send(signal.SIGTERM)
    bound = DRAIN_TIMEOUT + SHUTDOWN_TIMEOUT
    process = victim.running
    wait_until(lambda: not process.alive, bound, scene.service.progress.look)
    if process.poll() != 0:
        how = "lives on" if process.alive else f"ended with code {process.poll()}"
        scene.violations.append(f"{victim.name} {how} after SIGTERM: ...\n{process.end_of_log()}")
        process.kill()
    return {"code": process.poll()}


def stop(scene: Scene, victim: Part, draw: random.Random) -> Details:
    seconds = draw.uniform(*_STOP_SECONDS)
    process = victim.running
    process.send(signal.SIGSTOP)
    scene.pause(seconds)
    process.send(signal.SIGCONT)
    return {"seconds": seconds}


# --- of connections


def cut(scene: Scene, victim: Part, draw: random.Random) -> Details:
    """One of the trainer's connections with a target, or all."""
    found = connections_between(scene.service.parts[TRAINER].running.pid, victim.running.pid)
    chosen = found if draw.random() < _ALL_CUT_SHARE else draw.sample(found, min(1, len(found)))
    return {"cut": sum(connection.cut() for connection in chosen), "of": len(found)}


def slow(scene: Scene, victim: Part, draw: random.Random) -> Details:
    seconds, kilobits = draw.uniform(*_SLOW_SECONDS), draw.randint(*_SLOW_KILOBITS)
    with slowed_down(scene.port_of(victim), kilobits=kilobits):
        scene.pause(seconds)
    return {"seconds": seconds, "kilobits": kilobits}


def garbage(scene: Scene, victim: Part, draw: random.Random) -> Details:
    """On the RPC port, where torch itself may die of it, or close its port for good."""
    port = scene.port_of(victim)
    victim.may_end = GARBAGE[0]
    return _with_aftermath(scene, victim, port, {"bytes": send_garbage(port, draw)})


def truncated(scene: Scene, victim: Part, draw: random.Random) -> Details:
    port = scene.port_of(victim)
    victim.may_end = GARBAGE[1]
    return _with_aftermath(scene, victim, port, scene.let_act("truncated_messages", victim, draw))


def _with_aftermath(scene: Scene, victim: Part, port: int, details: Details) -> Details:
    """A target that nobody can reach any more has to end, so that another one can take its place."""
    process = victim.running
    look = scene.service.progress.look
    wait_until(lambda: not process.alive, _AFTERMATH_SECONDS, look)
    bound = DRAIN_TIMEOUT + SHUTDOWN_TIMEOUT
    if victim.role == "target" and not wait_until(
        lambda: not process.alive or port in listening_ports(), bound, look
    ):
        scene.violations.append(
            f"{victim.name} lives on without listening after {victim.may_end} ({details})"
        )
        process.kill()
    return {**details, "survived": process.alive}


def registry_garbage(scene: Scene, _victim: Part, draw: random.Random) -> Details:
    return {"bytes": sum(send_garbage(scene.service.port, draw) for _ in range(3))}


# --- of peers


def hostile(scene: Scene, victim: Part, draw: random.Random) -> Details:
    return scene.let_act("hostile_pickles", victim, draw)


def malformed(scene: Scene, victim: Part, draw: random.Random) -> Details:
    return scene.let_act("malformed_requests", victim, draw)


def abandon(scene: Scene, victim: Part, draw: random.Random) -> Details:
    return scene.let_act("abandoned_sessions", victim, draw)


# --- several at once


def outage(scene: Scene, victim: Part, draw: random.Random) -> Details:
    """One target is killed while the other stands still: nobody answers."""
    other = scene.service.parts[SURVIVOR]
    seconds = draw.uniform(*_STOP_SECONDS)
    other.running.send(signal.SIGSTOP)
    scene.kill(victim)
    scene.pause(seconds)
    other.running.send(signal.SIGCONT)
    return {"seconds": seconds}


def kill_with_registry(scene: Scene, victim: Part, _draw: random.Random) -> Details:
    scene.kill(scene.service.parts[REGISTRY])
    scene.kill(victim)
    return {}


def kill_with_trainer(scene: Scene, victim: Part, _draw: random.Random) -> Details:
    scene.kill(scene.service.parts[TRAINER])
    scene.kill(victim)
    return {}


@dataclass(frozen=True)
class Kind:
    """One kind of fault, who may be its victim, and how many of 500 it gets."""

    name: str
    victims: tuple[str, ...]
    share: int
    inject: Inject
    needs: str = ""  # "cut" or "slow": what this machine must permit


KINDS = (
    Kind("SIGKILL of a target", (MORTAL,), 50, kill),
    Kind("SIGTERM of a target", (MORTAL,), 40, terminate),
    Kind("stop of a target", _TARGETS, 60, stop),
    Kind("cut connection", _TARGETS, 70, cut, needs="cut"),
    Kind("slow connection", _TARGETS, 35, slow, needs="slow"),
    Kind("garbage on an RPC port", (MORTAL,), 25, garbage),
    Kind("garbage on the trainer's RPC port", (TRAINER,), 10, garbage),
    Kind("truncated message on an RPC port", (MORTAL,), 20, truncated),
    Kind("hostile pickles", _TARGETS, 25, hostile),
    Kind("malformed and oversized requests", _TARGETS, 25, malformed),
    Kind("abandoned sessions", _TARGETS, 25, abandon),
    Kind("no target for a while", (MORTAL,), 20, outage),
    Kind("SIGKILL of the trainer", (TRAINER,), 30, kill),
    Kind("SIGTERM of the trainer", (TRAINER,), 10, terminate),
    Kind("stop of the trainer", (TRAINER,), 15, stop),
    Kind("SIGKILL of the registry", (REGISTRY,), 10, kill),
    Kind("SIGTERM of the registry", (REGISTRY,), 5, terminate),
    Kind("stop of the registry", (REGISTRY,), 10, stop),
    Kind("garbage on the registry's port", (REGISTRY,), 10, registry_garbage),
    Kind("SIGKILL of registry and target", (MORTAL,), 10, kill_with_registry),
    Kind("SIGKILL of trainer and target", (MORTAL,), 10, kill_with_trainer),
)
