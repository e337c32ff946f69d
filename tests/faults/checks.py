"""The checks after a run: the same bits as without faults, every step once, nothing left behind."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.processes import descendants

from faults.isolation import Isolation, listening_ports, shared_memory_files
from faults.workspace import SEQUENCES_PER_STEP, Workspace

# Metrics that depend on the machine's speed.
# Figures of time, which no two runs share, by the beginnings of their names.
_PACE = ("tokens_per_second", "wait_share", "request_seconds")
_STATE = ("draft.safetensors", "optimiser.safetensors", "vocab_mapping.safetensors")
_POSITION = ("step", "sequences", "running_sums")
# A cache of torch that stays, and a directory that a killed torchrun leaves behind.
_TORCHS_OWN = ("torchinductor_", "torchelastic_")


@dataclass(frozen=True)
class Check:
    """A condition, and whether it holds."""

    name: str
    holds: bool
    found: str
    is_figure: bool = False  # depends on the machine's speed or on the length of the run

    @classmethod
    def none_of(cls, name: str, findings: Iterable[str], *, is_figure: bool = False) -> "Check":
        """Holds if there are no findings; shows the first ones."""
        findings = list(findings)
        shown = "; ".join(findings[:3]) + (f"; and {len(findings) - 3} more" if len(findings) > 3 else "")
        return cls(name, not findings, shown or "none", is_figure)


def same_training(
    workspace: Workspace, run: str, reference: str, steps: int, *, trainers: int = 1
) -> list[Check]:
    """Compares a run's end and all its steps with those of an undisturbed run."""
    ours, theirs = (workspace.run_dir(name) for name in (run, reference))
    lines, expected = (read_lines(directory / "metrics.jsonl") for directory in (ours, theirs))
    return [
        Check.none_of(
            "final weights, optimiser and data position bitwise equal to the undisturbed run",
            differences(ours, theirs, steps, steps * trainers * SEQUENCES_PER_STEP),
        ),
        Check.none_of("each step once, in order", disorder(lines, steps)),
        Check.none_of(
            "lost or repeated batches (figures of each step as undisturbed)", differing_steps(lines, expected)
        ),
    ]


def differences(ours: Path, theirs: Path, steps: int, sequences: int) -> list[str]:
    """Differences between the last checkpoints of two run directories."""
    ends = [directory / "checkpoints" / f"step_{steps}" for directory in (ours, theirs)]
    missing = [f"{end} is missing" for end in ends if not end.is_dir()]
    if missing:
        return missing
    found = [name for name in _STATE if (ends[0] / name).read_bytes() != (ends[1] / name).read_bytes()]
    facts = [json.loads((end / "checkpoint.json").read_text()) for end in ends]
    found += [name for name in _POSITION if facts[0][name] != facts[1][name]]
    if facts[0]["sequences"] != sequences:
        found.append(f"{facts[0]['sequences']} sequences consumed in {steps} steps instead of {sequences}")
    return found


def read_lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def disorder(lines: list[dict[str, Any]], steps: int) -> list[str]:
    """Steps that are missing, repeated or out of order among the lines of training."""
    found = [line["step"] for line in lines if "loss" in line]
    if found == list(range(1, steps + 1)):
        return []
    repeated = [step for step, count in Counter(found).items() if count > 1]
    missing = sorted(set(range(1, steps + 1)) - set(found))
    return [f"repeated {repeated[:5]}, missing {missing[:5]}, {len(found)} lines for {steps} steps"]


def differing_steps(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """Lines whose losses, counts or gradient norms differ from those of the undisturbed run."""
    if len(lines) != len(expected):
        return [f"{len(lines)} lines, {len(expected)} undisturbed"]
    return [
        f"step {one['step']}"
        for one, other in zip(lines, expected, strict=True)
        if without_pace(one) != without_pace(other)
    ]


def without_pace(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith(_PACE)}


@dataclass(frozen=True)
class Surroundings:
    """Processes, ports and files before a run; afterwards there may be no others."""

    workspace: Workspace
    isolation: Isolation
    kept: frozenset[int]  # processes that stay
    shared_memory: frozenset[str]
    ports: frozenset[int]
    temporary: frozenset[str]

    @classmethod
    def now(cls, workspace: Workspace, isolation: Isolation, kept: Iterable[int]) -> "Surroundings":
        temporary = frozenset(entry.name for entry in workspace.temporary.iterdir())
        return cls(
            workspace,
            isolation,
            frozenset(kept),
            frozenset(shared_memory_files()),
            frozenset(listening_ports()),
            temporary,
        )

    def leftovers(self) -> list[str]:
        """Processes, listening ports, shared-memory files and temporary files that were not there before.

        Without namespaces of its own, a fault test does not look at ports and shared memory: they belong to
        the machine.
        """
        found = [
            f"process {one.pid} ({' '.join(one.cmdline())[:80]})"
            for one in descendants(without=set(self.kept))
        ]
        temporary = {entry.name for entry in self.workspace.temporary.iterdir()} - self.temporary
        found += [f"temporary {name}" for name in temporary if not name.startswith(_TORCHS_OWN)]
        if self.isolation.private:
            found += [f"port {port}" for port in listening_ports() - self.ports]
            found += [f"/dev/shm/{name}" for name in shared_memory_files() - self.shared_memory]
        return found
