"""Scaling of a service: real clients, dispatchers, servers and schedulers with a stand-in forward, and a model.

All workers are threads of this process; the registry is a process of its own. A pass is a sleep, so a busy machine
slows none of them, but it delays what comes between: therefore costs are processor time, and efficiency is the
share of the time in which targets have a request to work on, less the processor time of a request. The rate by the
clock is printed beside it. The model predicts both from costs of single parts, measured first:

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --targets 16 --trainers 64 --forward 1
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --paper        # the model alone, up to 1,000 x 4,000
"""

import argparse
import logging
import tempfile
from dataclasses import asdict, fields, replace

import processes  # It puts `support` on the path.
import torch
from scaling_lab.costs import costs_of
from scaling_lab.measurement import measure
from scaling_lab.model import GBIT, Costs, predict
from scaling_lab.scenario import Scenario
from support.reporting import table

__all__ = ["processes"]

DEFAULT = Scenario(
    targets=4,
    trainers=16,
    forward=0.5,
    load=1.2,
    prefetch=4,
    neighbours=16,
    tokens=16,
    hidden_size=16,
    failures=0.0,
    outage=5.0,
    heartbeat_interval=1.0,
    seconds=15.0,
)
_WARM_UP_PASSES = 10
# An 8B target of 33,000 tokens/s with batches of 4 x 2,048; 32 KB of `hidden` a token.
_PAPER_PASS, _PAPER_REPLY = 8192 / 33000, 8192 * 32768
_SIZES = ((4, 16), (16, 64), (64, 256), (256, 1024), (1000, 4000))


def paper(costs: Costs) -> str:
    """The model's table by size, neighbours and link."""
    rows = []
    hidden_size = _PAPER_REPLY // (4 * 3 * 8192)
    for targets, trainers in _SIZES:
        for neighbours in (targets, 16) if targets > 16 else (targets,):
            for gigabits in (10, 100):
                scenario = replace(
                    DEFAULT,
                    targets=targets,
                    trainers=trainers,
                    forward=_PAPER_PASS,
                    neighbours=neighbours,
                    tokens=8192,
                    hidden_size=hidden_size,
                )
                found = predict(scenario, replace(costs, link=gigabits * GBIT))
                shares = (found.trainer_idle_share, found.target_idle_share, found.registry_share)
                rows.append(
                    (
                        f"{targets} x {trainers}",
                        neighbours,
                        gigabits,
                        f"{found.efficiency:.1%}",
                        found.bottleneck,
                        *(f"{share:.2f}" for share in shares),
                    )
                )
    titles = "targets x trainers|targets a trainer|Gbit/s|efficiency|bound|trainer idle|target idle|registry"
    return table(tuple(titles.split("|")), rows)


def comparison(scenario: Scenario, costs: Costs, directory: str) -> str:
    """Measured figures of one scenario, and the model's."""
    found = measure(scenario, directory, warm_up=_WARM_UP_PASSES * scenario.forward)
    expected = asdict(predict(scenario, costs))
    shown = {name: f"{value:.3g}" for name, value in asdict(found).items()}
    rows = [(name, value, expected.get(name, "")) for name, value in shown.items()]
    return table(("figure", "measured", "model"), rows) + f"\n\nThe model's bound: {expected['bottleneck']}."


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for one in fields(Scenario):
        default = getattr(DEFAULT, one.name)
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--paper", action="store_true", help="the model alone")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Each kill is a line of each trainer.
    logging.getLogger("eagle_rpc").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    scenario = Scenario(**{one.name: getattr(arguments, one.name) for one in fields(Scenario)})
    with tempfile.TemporaryDirectory(prefix="scaling-") as directory:
        costs = costs_of(directory)
        milliseconds = {name: 1e3 * value for name, value in asdict(costs).items() if name != "link"}
        print("ms of processor time:", ", ".join(f"{name} {one:.2f}" for name, one in milliseconds.items()))
        print(paper(costs) if arguments.paper else comparison(scenario, costs, directory))


if __name__ == "__main__":
    main()
