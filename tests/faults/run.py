"""`faults.py run`: training runs under faults until there were enough of them, for long enough."""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict

from faults.campaign import Campaign, Hang, Hit, finish_undisturbed, take_down
from faults.checks import Check, Surroundings, same_training
from faults.connections import can_cut
from faults.isolation import Isolation
from faults.kinds import GARBAGE, KINDS, Kind, Scene
from faults.processes import Zygote, ended_at_last
from faults.report import Report, mebibytes, spread, table
from faults.schedule import make_schedule
from faults.service import Restart, Service, free_ports
from faults.workplace import Workplace

_UNDISTURBED = "undisturbed"
_NICENESS = 5
# Growth of the surviving target from its warm level on.
_MEMORY_BAR = 0.05
_NEW_INCARNATION_BAR = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="training runs follow each other for at least so long"
    )
    parser.add_argument(
        "--faults", type=int, default=500, help="and until there were at least so many faults"
    )
    parser.add_argument("--faults-per-run", type=int, default=100)
    parser.add_argument(
        "--steps-per-fault", type=int, default=30, help="optimiser steps between two faults, on average"
    )


def permitted_kinds(isolation: Isolation, report: Report) -> list[Kind]:
    """Notes which kinds this machine does not permit."""
    permitted = {"": True, "cut": can_cut(), "slow": isolation.can_slow}
    left_out = [kind.name for kind in KINDS if not permitted[kind.needs]]
    if left_out:
        report.notes.append(f"Not permitted here, so left out: {', '.join(left_out)}. {isolation.note}")
    return [kind for kind in KINDS if permitted[kind.needs]]


def run(arguments: argparse.Namespace, zygote: Zygote, workplace: Workplace, isolation: Isolation) -> Report:
    """Every training run has its own trainer and schedule; targets and registry stay from the first to the last."""
    report = Report("Training under faults")
    kinds = permitted_kinds(isolation, report)
    steps = arguments.faults_per_run * arguments.steps_per_fault
    training = workplace.training_settings(steps=steps, seed=arguments.seed)
    surroundings = Surroundings.now(workplace, isolation, [zygote.pid])
    ports = free_ports(2)
    calm = Service(zygote, workplace, ports[0], _UNDISTURBED, num_targets=1)
    service = Service(zygote, workplace, ports[1], "service", num_targets=2, niceness=_NICENESS)
    campaign = Campaign(Scene(service))
    hangs: list[str] = []
    runs: list[str] = []
    with ended_at_last(lambda: calm.processes + service.processes):
        try:
            calm.start()
            calm.start_run(_UNDISTURBED, training)
            finish_undisturbed(calm)
            broken = take_down(calm)
            service.start()
            campaign.started = time.monotonic()
            while campaign.seconds < arguments.minutes * 60 or len(campaign.hits) < arguments.faults:
                runs.append(f"run{len(runs) + 1}")
                seed = arguments.seed * 1000 + len(runs)
                campaign.run(
                    runs[-1],
                    training,
                    make_schedule(kinds, count=arguments.faults_per_run, steps=steps, seed=seed),
                )
                report.checks += same_training(workplace, runs[-1], _UNDISTURBED, steps)
            broken += take_down(service)
        except Hang as hang:
            hangs.append(str(hang))
            report.notes += [
                f"{part.name}, last words: {part.running.end_of_log()}"
                for part in service.parts.values()
                if part.process
            ]
            broken = []
    _add_checks(report, campaign, hangs, broken, surroundings.leftovers())
    _add_tables(report, campaign, runs, steps)
    return report


def _add_checks(
    report: Report, campaign: Campaign, hangs: list[str], broken: list[str], leftovers: list[str]
) -> None:
    scene, service = campaign.scene, campaign.scene.service
    warm, last = campaign.usage_levels()
    growth = last.resident / warm.resident - 1
    torn = [one for one in service.restarts if one.why in GARBAGE]
    slow = [
        f"{one.part} after {one.seconds_to_serve:.1f} s"
        for one in torn
        if one.seconds_to_serve > _NEW_INCARNATION_BAR
    ]
    report.checks = [
        *merged(report.checks),
        Check.none_of("hangs over the configured deadline", hangs),
        Check.none_of("processes that ended of themselves", service.unexpected),
        Check.none_of(
            "promises broken (exit codes, answers to hostile requests, commands executed)",
            scene.violations + broken,
        ),
        Check.none_of("processes, ports, shared memory or temporary files left behind", leftovers),
        Check.none_of(
            f"new incarnations after garbage that served later than {_NEW_INCARNATION_BAR:.0f} s, of {len(torn)}",
            slow,
            is_figure=True,
        ),
        Check(
            "memory of the target that lives throughout: at the end within 5 % of its level after warm-up",
            growth <= _MEMORY_BAR,
            f"{mebibytes(warm.resident)} to {mebibytes(last.resident)} ({100 * growth:+.1f} %); without files "
            f"{mebibytes(warm.anonymous)} to {mebibytes(last.anonymous)}; descriptors {warm.descriptors} to {last.descriptors}",
            is_figure=True,
        ),
    ]


def merged(checks: Sequence[Check]) -> list[Check]:
    """One check for each name, over all training runs."""
    by_name: dict[str, list[Check]] = defaultdict(list)
    for check in checks:
        by_name[check.name].append(check)
    return [
        Check(
            name,
            all(one.holds for one in found),
            f"in {len(found)} runs: "
            + (
                "yes"
                if all(one.holds for one in found)
                else "; ".join(one.found for one in found if not one.holds)
            ),
        )
        for name, found in by_name.items()
    ]


def _add_tables(report: Report, campaign: Campaign, runs: list[str], steps: int) -> None:
    service = campaign.scene.service
    report.notes.append(
        f"{len(campaign.hits)} faults in {campaign.seconds / 60:.1f} minutes, {len(runs)} training runs of {steps} steps one after "
        "the other on the same targets and registry."
    )
    if campaign.failures:
        report.notes.append(f"Faults that could not be made, not counted: {'; '.join(campaign.failures)}")
    by_kind: dict[str, list[Hit]] = defaultdict(list)
    for hit in campaign.hits:
        by_kind[hit.kind].append(hit)
    rows = [
        (kind, len(hits), spread([hit.stall for hit in hits]), spread([hit.whole for hit in hits]))
        for kind, hits in sorted(by_kind.items())
    ]
    report.tables.append(
        table(
            (
                "fault",
                "number",
                "pause of training, s (median, longest)",
                "until all was whole, s (median, longest)",
            ),
            rows,
        )
    )
    report.tables.append(_restarts(service.restarts))
    report.tables.append(_answers(campaign.scene))
    report.record = {
        "seconds": campaign.seconds,
        "hits": [asdict(hit) for hit in campaign.hits],
        "restarts": [asdict(one) for one in service.restarts],
        "usage": [one._asdict() for one in campaign.usage],
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _answers(scene: Scene) -> str:
    rows = [
        (name.replace("_", " "), count["asked"], count["as_promised"])
        for name, count in sorted(scene.answers.items())
    ]
    return table(("rogues' doings", "number", "answered or borne as promised"), rows)


def _restarts(restarts: list[Restart]) -> str:
    by_reason: dict[str, list[float]] = defaultdict(list)
    for one in restarts:
        by_reason[one.why].append(one.seconds_to_serve)
    rows = [(why, len(seconds), spread(seconds)) for why, seconds in sorted(by_reason.items())]
    return table(
        ("target started anew after", "number", "from process start until it serves, s (median, longest)"),
        rows,
    )
