"""Parts 1 and 2: targets and trainers of one static job, and an elastic one that lives through a kill."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from measuring import size_of
from processes import Command, Process, free_port, python_module, running, static_job
from support.processes import torchrun_environment

from many_lab.plan import Figures, Lab, Run

# Targets x trainers, by the cards that they need: those with equally many, and with few or many of each.
TOPOLOGIES = ((1, 1), (2, 2), (1, 3), (3, 1), (4, 4), (2, 6), (1, 7))
# Of a run's seconds: those in which its processes have to be ready.
_START_SHARE = 0.6
# Seconds of an elastic service to start, and of its trainers between two looks before they count as locked.
_PATIENCE = 300.0
# Optimiser steps between two looks at an endurance run.
_STEPS_OF_A_LOOK = 4
_WORKER = "end_to_end_worker"
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def topology_runs(lab: Lab) -> Iterator[Run]:
    """Part 1."""
    for targets, trainers in TOPOLOGIES:
        yield Run(
            part=1,
            name=f"{targets} x {trainers}",
            cards=targets + trainers,
            seconds=420.0,
            measure=partial(_measure_topology, targets=targets, trainers=trainers),
        )
    yield Run(
        part=1,
        name="2 x 2, one target killed",
        cards=4,
        seconds=lab.seconds + _PATIENCE,
        measure=_endure,
    )


def divided_runs() -> Iterator[Run]:
    """The runs of part 2 in which a divided target is trained from."""
    for devices in (2, 4):
        for trainers in (1, 2):
            yield Run(
                part=2,
                name=f"training, a target over {devices} cards x {trainers}",
                cards=devices + trainers,
                seconds=540.0,
                measure=partial(_measure_topology, targets=1, trainers=trainers, devices_per_target=devices),
            )


def _measure_topology(
    lab: Lab, seconds: float, directory: Path, *, targets: int, trainers: int, devices_per_target: int = 1
) -> Figures:
    """Trained tokens per second, waits on both sides, and what each half gives by itself.

    By themselves: a target whose queue is never empty, and all trainers on supervision that they have.
    """
    work, divided = lab.work, devices_per_target > 1
    overrides = [
        *lab.overrides(work.divided if divided else work.trained, directory),
        f"topology.targets={targets}",
        f"topology.trainers={trainers}",
        f"topology.devices_per_target={devices_per_target}",
    ]
    numbers = {"targets": targets, "trainers": trainers}
    *servers, last = static_job(_WORKER, *overrides, target_answers=True, **numbers)
    deadline = time.monotonic() + seconds
    with running(servers, last, directory, start_timeout=_START_SHARE * seconds) as (others, trainer):
        all_targets, all_trainers = others[:targets], [*others[targets:], trainer]
        for other in all_trainers[:-1]:
            other.answer(_left(deadline))
        trained = _trained(lab, all_trainers, deadline, warmups=work.warmups, steps=work.steps)
        span = {name: trained.pop(name) for name in ("started", "ended")}
        idle = [target.ask(seconds=_left(deadline), **span)["idle_share"] for target in all_targets]
        alone = _trained(lab, all_trainers, deadline, warmups=1, steps=work.steps, kept=True)
        served = all_targets[0].ask(seconds=_left(deadline), requests=work.requests)["tokens_per_second"]
    halves = {"target_alone": served, "trainers_alone": alone["tokens_per_second"]}
    slower = min(targets * served, alone["tokens_per_second"])
    return {
        **numbers,
        "devices_per_target": devices_per_target,
        **trained,
        "target_idle_shares": idle,
        **halves,
        "of_the_slower_half": trained["tokens_per_second"] / slower,
    }


def _trained(
    lab: Lab, trainers: Sequence[Process], deadline: float, *, steps: int, **question: object
) -> Figures:
    """Figures of all trainers together over so many optimiser steps, with the span of time that they took."""
    for trainer in trainers:
        trainer.tell(steps=steps, **question)
    answers = [trainer.answer(_left(deadline)) for trainer in trainers]
    started, ended = min(one["started"] for one in answers), max(one["ended"] for one in answers)
    rows, length = size_of(lab.work.size)
    return {
        "started": started,
        "ended": ended,
        "tokens_per_second": steps * len(trainers) * rows * length / (ended - started),
        "trainer_wait_shares": [one["waited"] / (one["ended"] - one["started"]) for one in answers],
        "trainer_peak_gib": max(one["peak_bytes"] for one in answers) / 2**30,
    }


def _left(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def _endure(lab: Lab, seconds: float, directory: Path) -> Figures:
    """Two trainers and two targets of an elastic service; target 0 is killed after a third of the time.

    Raises `RuntimeError` if a look at the trainers takes as long as the start may: they are locked.
    """
    again = directory / "target0_again.log"
    with _elastic_service(lab, directory, again) as (trainers, restart_target):
        started, looks, killed, returned = time.monotonic(), [], None, None
        while (now := time.monotonic() - started) < lab.seconds:
            if killed is None and now > lab.seconds / 3:
                killed = now
                restart_target()
            elif killed and returned is None and " serving " in again.read_text():
                returned = now
            deadline = time.monotonic() + _PATIENCE
            figures = _trained(lab, trainers, deadline, warmups=0, steps=_STEPS_OF_A_LOOK)
            looks.append((now, figures["ended"] - figures["started"], figures["tokens_per_second"]))
    before = [rate for at, _, rate in looks if killed is None or at < killed]
    after = [rate for at, _, rate in looks if killed is not None and at >= killed]
    return {
        "seconds": lab.seconds,
        "optimiser_steps": _STEPS_OF_A_LOOK * len(looks),
        "killed_after": killed,
        "serving_again_after": returned,
        "longest_look": max(took for _, took, _ in looks),
        "tokens_per_second": sum(before) / len(before),
        "tokens_per_second_later": sum(after) / len(after) if after else None,
    }


@contextlib.contextmanager
def _elastic_service(
    lab: Lab, directory: Path, again: Path
) -> Iterator[tuple[list[Process], Callable[[], None]]]:
    """Its trainers, which are ready, and a function that kills target 0 and starts it anew with the log `again`."""
    meeting = ["rpc=elastic", f"rpc.registry=127.0.0.1:{free_port()}", f"rpc.token_file={directory}/token"]
    settings = [*lab.overrides(lab.work.trained, directory), *meeting]
    registry = python_module("registry", "eagle_rpc", "job=registry", *meeting, f"run.dir={directory}/run")
    targets = [
        python_module(
            f"target{number}",
            _WORKER,
            "elastic_target",
            *settings,
            f"topology.first_target={number}",
            environment=_card(lab, number),
        )
        for number in range(2)
    ]
    port = free_port()
    trainers = [
        python_module(
            f"trainer{rank}",
            _WORKER,
            "elastic_trainer",
            *settings,
            "topology.trainers=2",
            environment={**torchrun_environment(rank, 2, port), **_card(lab, 2 + rank)},
            answers=True,
        )
        for rank in range(2)
    ]
    servers: list[Command] = [registry, *targets, trainers[0]]
    with contextlib.ExitStack() as stack:
        others, last = stack.enter_context(running(servers, trainers[1], directory, start_timeout=_PATIENCE))
        others[-1].answer(_PATIENCE)

        def restart_target() -> None:
            others[1].kill()
            fresh = targets[0].start(log=again, directory=Path(__file__).parents[1])
            stack.callback(fresh.end, 60.0)

        yield [others[-1], last], restart_target


def _card(lab: Lab, number: int) -> dict[str, str]:
    """Each worker of an elastic service sees a GPU of its own."""
    if not lab.on_gpus:
        return {}
    visible = os.environ.get(_VISIBLE, "").split(",")
    return {_VISIBLE: visible[number] if number < len(visible) and visible[number] else str(number)}
