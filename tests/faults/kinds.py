"""The list of faults: what each kind does, to whom, and how often."""

from dataclasses import dataclass

from faults import injections as inject
from faults.injections import ENDED_TARGET, STEADY_TARGET
from faults.service import REGISTRY, TRAINER

_ENDED, _EITHER = (ENDED_TARGET,), (ENDED_TARGET, STEADY_TARGET)


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    name: str
    victims: tuple[str, ...]  # workers that it may hit
    share: int  # of 500 faults
    inject: inject.Inject
    effect: str  # the fault, and the behaviour that must follow
    needs: str = ""  # "cut" or "slow": what this machine must permit


# fmt: off
KINDS = (
    Kind("SIGKILL of a target", _ENDED, 50, inject.kill, "training goes on at the other target"),
    Kind("SIGTERM of a target", _ENDED, 40, inject.terminate, "it drains and ends with code 0"),
    Kind("stop of a target", _EITHER, 60, inject.stop, "SIGSTOP, and SIGCONT after 0.5 to 6 s"),
    Kind("cut connection", _EITHER, 70, inject.cut, "one or all of the trainer's connections to a target end", "cut"),
    Kind("slow connection", _EITHER, 35, inject.slow, "300 to 2000 kbit/s at a target's port for 1 to 4 s", "slow"),
    Kind("garbage on an RPC port", _ENDED, 25, inject.garbage, "random bytes; the target serves on or is replaced"),
    Kind("garbage on the trainer's RPC port", (TRAINER,), 10, inject.garbage, "random bytes; training goes on"),
    Kind("truncated message on an RPC port", _ENDED, 20, inject.truncated, "the beginning of a real conversation"),
    Kind("hostile pickles", _EITHER, 25, inject.hostile, "a peer sends commands; all refused, none executed"),
    Kind("malformed and oversized requests", _EITHER, 25, inject.malformed, "a peer breaks rules; all refused"),
    Kind("abandoned sessions", _EITHER, 25, inject.abandon, "a peer opens sessions, asks for work and dies"),
    Kind("no target for a while", _ENDED, 20, inject.outage, "one target is killed while the other is stopped"),
    Kind("SIGKILL of the trainer", (TRAINER,), 30, inject.kill, "it resumes from its last checkpoint"),
    Kind("SIGTERM of the trainer", (TRAINER,), 10, inject.terminate, "it writes a checkpoint, ends with code 0"),
    Kind("stop of the trainer", (TRAINER,), 15, inject.stop, "its lease at the targets can expire meanwhile"),
    Kind("SIGKILL of the registry", (REGISTRY,), 10, inject.kill, "workers announce themselves to the next one"),
    Kind("SIGTERM of the registry", (REGISTRY,), 5, inject.terminate, "it ends with code 0"),
    Kind("stop of the registry", (REGISTRY,), 10, inject.stop, "workers go on without it"),
    Kind("garbage on the registry's port", (REGISTRY,), 10, inject.registry_garbage, "the registry serves on"),
    Kind("SIGKILL of registry and target", _ENDED, 10, inject.kill_with_registry, "both are started anew"),
    Kind("SIGKILL of trainer and target", _ENDED, 10, inject.kill_with_trainer, "both are started anew"),
)

# With targets of several stages, in place of the others.
STAGE_KINDS = (
    Kind("SIGKILL of a stage", ("target0.1",), 17, inject.kill, "its target hands requests back until it returns"),
    Kind("SIGKILL of a first stage", _ENDED, 3, inject.kill, "the next one takes over the stages that are still there"),
)
# fmt: on
