"""`run`: training runs under a schedule of faults, for a number of minutes and of faults."""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from support.processes import ended_at_last, free_ports
from support.reporting import table

from faults.campaign import Campaign, Hang, finish_undisturbed, take_down
from faults.checks import Check, Surroundings, same_training
from faults.connections import can_cut
from faults.injections import GARBAGE, Context
from faults.isolation import Isolation
from faults.kinds import KINDS, STAGE_KINDS, Kind
from faults.report import Report, mebibytes, spread
from faults.schedule import make_schedule
from faults.service import Service
from faults.workspace import Workspace
from faults.zygote import Zygote

_UNDISTURBED = "undisturbed"
_NICENESS = 5
_MEMORY_GROWTH = 0.05  # of the steady target, from its level after warm-up on
_NEW_INCARNATION_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="at least, one training run after the other"
    )
    parser.add_argument("--faults", type=int, default=500, help="at least, in all runs together")
    parser.add_argument("--faults-per-run", type=int, default=100)
    parser.add_argument(
        "--stages", type=int, default=1, help="of each target; with several, faults are kills of stages"
    )
    parser.add_argument(
        "--steps-per-fault", type=int, default=30, help="mean number of optimiser steps between faults"
    )


def permitted_kinds(isolation: Isolation, report: Report) -> list[Kind]:
    """The kinds that this machine permits; a note of the report names the others."""
    permitted = {"": True, "cut": can_cut(), "slow": isolation.can_slow}
    left_out = [kind.name for kind in KINDS if not permitted[kind.needs]]
    if left_out:
        report.notes.append(f"Not permitted here, so left out: {', '.join(left_out)}. {isolation.note}")
    return [kind for kind in KINDS if permitted[kind.needs]]


def run(arguments: argparse.Namespace, zygote: Zygote, workspace: Workspace, isolation: Isolation) -> Report:
    """Every training run has its own trainer and schedule; targets and registry live from the first run to the last."""
    report = Report("Training under faults")
    kinds = permitted_kinds(isolation, report) if arguments.stages == 1 else list(STAGE_KINDS)
    steps = arguments.faults_per_run * arguments.steps_per_fault
    training = workspace.training_settings(steps=steps, seed=arguments.seed)
    surroundings = Surroundings.now(workspace, isolation, [zygote.pid])
    ports = free_ports(2)
    undisturbed = Service(zygote, workspace, ports[0], _UNDISTURBED, num_targets=1)
    service = Service(
        zygote,
        workspace,
        ports[1],
        "service",
        num_targets=2,
        num_stages=arguments.stages,
        niceness=_NICENESS,
    )
    campaign = Campaign(Context(service))
    hangs, runs, broken = [], [], []
    with ended_at_last(lambda: undisturbed.processes + service.processes):
        try:
            undisturbed.start()
            undisturbed.start_run(_UNDISTURBED, training)
            finish_undisturbed(undisturbed)
            broken = take_down(undisturbed)
            service.start()
            campaign.started = time.monotonic()
            while campaign.seconds < arguments.minutes * 60 or len(campaign.hits) < arguments.faults:
                runs.append(f"run{len(runs) + 1}")
                seed = arguments.seed * 1000 + len(runs)
                schedule = make_schedule(kinds, count=arguments.faults_per_run, steps=steps, seed=seed)
                campaign.run(runs[-1], training, schedule)
                report.checks += same_training(workspace, runs[-1], _UNDISTURBED, steps)
            broken += take_down(service)
        except Hang as hang:
            hangs.append(str(hang))
            started = [worker for worker in service.workers.values() if worker.process]
            report.notes += [f"{worker.name}'s log ends: {worker.running.end_of_log()}" for worker in started]
    report.checks = _checks(report.checks, campaign, hangs, broken, surroundings.leftovers())
    report.notes += _notes(campaign, len(runs), steps)
    report.tables += _tables(campaign)
    report.record = {
        "seconds": campaign.seconds,
        "hits": [asdict(hit) for hit in campaign.hits],
        "restarts": [asdict(one) for one in service.restarts],
        "usage": [one._asdict() for one in campaign.usage],
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return report


def _checks(
    of_runs: list[Check], campaign: Campaign, hangs: list[str], broken: list[str], leftovers: list[str]
) -> list[Check]:
    context, service = campaign.context, campaign.context.service
    warm, last = campaign.usage_levels()
    growth = last.resident / warm.resident - 1
    after_garbage = [one for one in service.restarts if one.why in GARBAGE]
    late = [one for one in after_garbage if one.seconds_to_serve > _NEW_INCARNATION_SECONDS]
    return [
        *merged(of_runs),
        Check.none_of("hangs over the configured deadline", hangs),
        Check.none_of("processes that ended without a reason", service.unexpected),
        Check.none_of(
            "promises broken (exit codes, answers to hostile requests, commands executed)",
            context.violations + broken,
        ),
        Check.none_of("processes, ports, shared memory or temporary files left behind", leftovers),
        Check.none_of(
            f"targets that served later than {_NEW_INCARNATION_SECONDS:.0f} s after garbage, of {len(after_garbage)}",
            [f"{one.worker} after {one.seconds_to_serve:.1f} s" for one in late],
            is_figure=True,
        ),
        Check(
            "memory of the steady target: at the end within 5 % of its level after warm-up",
            growth <= _MEMORY_GROWTH,
            f"{mebibytes(warm.resident)} to {mebibytes(last.resident)} ({100 * growth:+.1f} %); without files "
            f"{mebibytes(warm.anonymous)} to {mebibytes(last.anonymous)}; "
            f"descriptors {warm.descriptors} to {last.descriptors}",
            is_figure=True,
        ),
    ]


def merged(checks: Sequence[Check]) -> list[Check]:
    """One check for each name, over all training runs."""
    by_name: dict[str, list[Check]] = defaultdict(list)
    for check in checks:
        by_name[check.name].append(check)
    result = []
    for name, found in by_name.items():
        failed = [one.found for one in found if not one.holds]
        result.append(Check(name, not failed, f"in {len(found)} runs: {'; '.join(failed) or 'yes'}"))
    return result


def _notes(campaign: Campaign, num_runs: int, steps: int) -> list[str]:
    notes = [
        f"{len(campaign.hits)} faults in {campaign.seconds / 60:.1f} minutes, {num_runs} training runs "
        f"of {steps} steps one after the other with the same targets and registry."
    ]
    if campaign.failures:
        notes.append(f"Faults that could not be injected: {'; '.join(campaign.failures)}")
    return notes


def _tables(campaign: Campaign) -> list[str]:
    stalls = _grouped((hit.kind, hit.stall) for hit in campaign.hits)
    recoveries = _grouped((hit.kind, hit.recovery) for hit in campaign.hits)
    restarts = _grouped((one.why, one.seconds_to_serve) for one in campaign.context.service.restarts)
    answers = sorted(campaign.context.answers.items())
    return [
        table(
            (
                "fault",
                "number",
                "pause of training, s (median, longest)",
                "until all served, s (median, longest)",
            ),
            [
                (kind, len(stalls[kind]), spread(stalls[kind]), spread(recoveries[kind]))
                for kind in sorted(stalls)
            ],
        ),
        table(
            (
                "target started anew after",
                "number",
                "from process start until it serves, s (median, longest)",
            ),
            [(why, len(seconds), spread(seconds)) for why, seconds in sorted(restarts.items())],
        ),
        table(
            ("act of a hostile peer", "number", "answered as promised"),
            [(name.replace("_", " "), count["asked"], count["as_promised"]) for name, count in answers],
        ),
    ]


def _grouped(pairs: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in pairs:
        groups[name].append(value)
    return groups
