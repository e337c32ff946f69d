"""`rolling`: several targets and trainers; every target is restarted in turn while they train, and none is missed."""

import argparse

from support.processes import ended_at_last, free_ports
from support.reporting import table
from support.waiting import happens, pause

from faults import injections
from faults.campaign import Campaign, Hang, finish_undisturbed, take_down
from faults.checks import Check, Surroundings, same_training
from faults.injections import Context
from faults.isolation import Isolation
from faults.kinds import Kind
from faults.report import Report
from faults.schedule import Fault
from faults.service import Service
from faults.workspace import ACCUMULATION, HEARTBEAT, RECONNECT_DEADLINE, VALIDATION_BATCHES, Workspace
from faults.zygote import Zygote

_UNDISTURBED, _ROLLING = "undisturbed", "rolling"
_UNEVEN = 0.10
# Requests of a trainer that may be under way when it has enough.
_PREFETCH = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", type=int, default=4)
    parser.add_argument("--trainers", type=int, default=8)
    parser.add_argument("--steps-per-restart", type=int, default=25)


def run(arguments: argparse.Namespace, zygote: Zygote, workspace: Workspace, isolation: Isolation) -> Report:
    """An undisturbed run shows the load of each target; in the next run each target is told to stop and restarted."""
    targets, trainers = arguments.targets, arguments.trainers
    steps = arguments.steps_per_restart * (targets + 2)
    report = Report(f"A rolling restart of {targets} targets with {trainers} trainers")
    training = [
        *workspace.training_settings(steps=steps, seed=arguments.seed),
        f"topology.trainers={trainers}",
        f"supervision.prefetch={_PREFETCH}",
        "train.validate_every=0",
    ]
    surroundings = Surroundings.now(workspace, isolation, [zygote.pid])
    port = free_ports(1)[0]
    service = Service(zygote, workspace, port, "service", num_targets=targets, num_trainers=trainers)
    campaign = Campaign(Context(service))
    hangs, broken = [], []
    with ended_at_last(lambda: service.processes):
        try:
            service.start()
            # So that every target is there from the first batch on.
            if not happens(service.complete, within=RECONNECT_DEADLINE, meanwhile=service.revive):
                raise Hang(f"waited {RECONNECT_DEADLINE:.0f} s for all targets to serve")
            service.start_run(_UNDISTURBED, training)
            finish_undisturbed(service)
            # Targets announce their counts with each beat.
            pause(3 * HEARTBEAT, service.revive)
            served = served_by(service)
            campaign.run(_ROLLING, training, restarts(targets, arguments.steps_per_restart))
            report.checks += same_training(workspace, _ROLLING, _UNDISTURBED, steps, trainers=trainers)
            broken = take_down(service)
            report.checks += load_checks(
                served, steps * ACCUMULATION * trainers, trainers * (_PREFETCH + VALIDATION_BATCHES)
            )
        except Hang as hang:
            hangs.append(str(hang))
            started = [worker for worker in service.workers.values() if worker.process]
            report.notes += [f"{worker.name}'s log ends: {worker.running.end_of_log()}" for worker in started]
    restarted = [one.worker for one in service.restarts]
    report.checks = [
        *report.checks,
        Check(
            "every target restarted once",
            sorted(restarted) == sorted(one.name for one in service.targets),
            ", ".join(restarted),
        ),
        Check.none_of("hangs over the configured deadline", hangs),
        Check.none_of("processes that ended without a reason", service.unexpected),
        Check.none_of("promises broken (exit codes)", campaign.context.violations + broken),
        Check.none_of("faults that could not be injected", campaign.failures),
        Check.none_of("processes, ports or files left behind", surroundings.leftovers()),
    ]
    rows = [(one.worker, f"{one.seconds_to_serve:.1f}") for one in service.restarts]
    report.tables.append(table(("restarted", "s until it served"), rows))
    rows = [(hit.victim, hit.step, f"{hit.stall:.2f}") for hit in campaign.hits]
    report.tables.append(table(("told to stop", "at step", "longest pause of training, s"), rows))
    return report


def restarts(targets: int, steps: int) -> list[Fault]:
    names = [f"target{index}" for index in range(targets)]
    kind = Kind("rolling restart", tuple(names), 1, injections.terminate, "it drains and ends with code 0")
    return [Fault((index + 1) * steps, kind, name, 0) for index, name in enumerate(names)]


def served_by(service: Service) -> dict[str, int]:
    """Requests that each target has answered with supervision."""
    counts = {one.name: one.status["requests"] for one in service.records() if one.role == "target"}
    return {name: requests.get("ok", 0) for name, requests in counts.items()}


def load_checks(served: dict[str, int], needed: int, ahead: int) -> list[Check]:
    """`ahead`: further requests that may be answered, for validation or because trainers ask early."""
    total, mean = sum(served.values()), sum(served.values()) / len(served)
    uneven = max(abs(one - mean) for one in served.values()) / mean
    found = (
        f"{', '.join(f'{name} {one}' for name, one in sorted(served.items()))}; {uneven:.1%} from the mean"
    )
    return [
        Check(
            "every batch served once (answered requests; more only for validation and for batches asked for early)",
            needed <= total <= needed + ahead,
            f"{total} answered, {needed} needed",
        ),
        Check("load of equal targets within 10 %", uneven <= _UNEVEN, found, is_figure=True),
    ]
