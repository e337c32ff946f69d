"""`stalls`: the trainer's wait after a kill of a target, with a second target and without."""

import argparse
import statistics
import time
from dataclasses import asdict, dataclass

from support.reporting import table
from support.waiting import pause

from faults.isolation import Isolation
from faults.observed import LONGEST, MEDIAN, WINDOW, Observed, below, longest_pause, observed
from faults.report import Report, spread
from faults.workspace import Workspace
from faults.zygote import Zygote

# Bounds of further checks, in seconds.
_RESUMPTION, _REQUEST = 5.0, 0.05
_AWAY_SECONDS = (0.0, 3.0)  # between the end of a sole target and its next start
_NUM_CALM_WINDOWS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=30, help="of one of two targets")
    parser.add_argument("--restarts", type=int, default=15, help="of a sole target")
    parser.add_argument("--train-seconds", type=float, default=0.02, help="of the trainer for each batch")


def run(arguments: argparse.Namespace, zygote: Zygote, workspace: Workspace, _isolation: Isolation) -> Report:
    with observed(zygote, workspace, "pair", 2, arguments) as pair:
        kills = [stall_at_kill(pair, number) for number in range(arguments.kills)]
        calm = calm_pauses(pair)
    with observed(zygote, workspace, "sole", 1, arguments) as sole:
        resumptions = [resumption(sole, number) for number in range(arguments.restarts)]
    stalls, resumed = [one.stall for one in kills], [one.resumed for one in resumptions]
    requests = pair.request_seconds + sole.request_seconds
    note = (
        f"A trainer takes batches over elastic membership, trains {1000 * arguments.train_seconds:.0f} ms "
        "on each and has 4 requests under way. A stall is the longest time between two batches in the two "
        "seconds after a kill, training included. One of two killed targets is started anew at once, a sole one after "
        f"{_AWAY_SECONDS[0]:.0f} to {_AWAY_SECONDS[1]:.0f} s."
    )
    rows = [
        ("one of two targets killed", len(stalls), spread(stalls)),
        ("no kill: the longest pause of two seconds", len(calm), spread(calm)),
        ("sole target killed: from readiness to the next batch", len(resumed), spread(resumed)),
        ("sole target killed: kill to next batch", len(resumed), spread([one.outage for one in resumptions])),
    ]
    return Report(
        "Stalls",
        notes=[note],
        tables=[table(("case", "number", "s (median, longest)"), rows)],
        checks=[
            below(LONGEST, "longest stall when one of two targets is killed", max(stalls)),
            below(MEDIAN, "median of these stalls", statistics.median(stalls)),
            below(_RESUMPTION, "sole target: from its readiness to the next batch", max(resumed)),
            below(_REQUEST, "median time of a request", statistics.median(requests)),
        ],
        record={
            "kills": [asdict(one) for one in kills],
            "resumptions": [asdict(one) for one in resumptions],
            "calm": calm,
        },
    )


@dataclass(frozen=True)
class Kill:
    """A kill of one of two targets. Seconds."""

    victim: str
    stall: float


def stall_at_kill(pair: Observed, number: int) -> Kill:
    pair.recover()
    victim = f"target{pair.draw.randrange(2)}"
    moment = pair.kill(victim)
    pause(WINDOW, pair.look)
    pair.wait(lambda: pair.batch_times()[-1] > moment + WINDOW, f"a batch after the kill of {victim}")
    stall = longest_pause(pair.batch_times(), moment, moment + WINDOW)
    print(f"kill {number + 1} of {victim}: stall {stall:.3f} s", flush=True)
    return Kill(victim, stall)


def calm_pauses(pair: Observed) -> list[float]:
    """The longest pause of each of ten windows without a kill."""
    pauses = []
    for _ in range(_NUM_CALM_WINDOWS):
        pair.recover()
        moment = time.monotonic()
        pause(WINDOW + 0.5, pair.look)
        pauses.append(longest_pause(pair.batch_times(), moment, moment + WINDOW))
    return pauses


@dataclass(frozen=True)
class Resumption:
    """The end and the next start of a sole target. Seconds."""

    outage: float  # from the kill to the next batch
    resumed: float  # from the new target's record in the registry to the next batch


def resumption(sole: Observed, number: int) -> Resumption:
    sole.recover()
    moment = sole.kill("target0")
    # Replies that were under way may still arrive.
    pause(sole.draw.uniform(*_AWAY_SECONDS))
    before = sole.num_batches
    sole.service.revive()
    sole.wait(sole.serving, "the new target to serve")
    ready = time.monotonic()
    sole.wait(lambda: sole.num_batches > before, "a batch from the new target")
    first = sole.batch_times()[before]
    found = Resumption(outage=first - moment, resumed=max(0.0, first - ready))
    print(
        f"restart {number + 1}: {found.resumed:.3f} s from readiness to the next batch, outage {found.outage:.2f} s",
        flush=True,
    )
    return found
