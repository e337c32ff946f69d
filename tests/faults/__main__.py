"""Kills, stops, cuts and garbage: whether training over the elastic service ends with the same bits, and how soon it goes on.

    python benchmarks/faults.py run --minutes 30 --faults 500 --seed 1     a training run under a schedule of faults
    python benchmarks/faults.py stalls                                     how long a trainer waits when a target is killed
    python benchmarks/faults.py cycles --count 300                         starts and stops in every mode

All on loopback, with a tiny model. As root the lab has a network and a /dev/shm of its own; otherwise the faults that need
that are left out, and it says so.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from faults import cycles, run, stalls
from faults.isolation import Isolation, isolate
from faults.processes import Zygote, ended_at_last, wait_until
from faults.workplace import Workplace


@contextlib.contextmanager
def laboratory(directory: Path) -> Iterator[tuple[Zygote, Workplace, Isolation]]:
    """A place to work, alone where that is permitted, and a zygote in it."""
    isolation = isolate()
    if isolation.note:
        print(isolation.note, flush=True)
    workplace = Workplace(directory).prepare()
    with Zygote(directory, workplace.environment) as zygote:
        maker = zygote.fork(
            "faults.workplace:make_model", [str(workplace.model)], log=workplace.logs / "model.log"
        )
        with ended_at_last(lambda: [maker]):
            if not wait_until(lambda: not maker.alive, 60) or maker.poll() != 0:
                raise RuntimeError(f"the model was not made: {maker.end_of_log()}")
        yield zygote, workplace, isolation


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, module in (("run", run), ("stalls", stalls), ("cycles", cycles)):
        command = commands.add_parser(name, help=module.__doc__.partition(": ")[2])
        module.add_arguments(command)
        command.add_argument("--seed", type=int, default=1)
        command.add_argument(
            "--output",
            type=Path,
            help="directory that keeps record, report and logs; a temporary one otherwise",
        )
        command.set_defaults(run=module.run)
    return parser.parse_args()


def main() -> int:
    """0 if every bar was met."""
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack:
        directory = arguments.output or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-"))
        )
        directory = directory.resolve()
        if arguments.output and directory.exists():
            raise SystemExit(f"--output must be a new directory, {directory} exists")
        directory.mkdir(parents=True, exist_ok=True)
        with laboratory(directory / "workplace") as (zygote, workplace, isolation):
            report = arguments.run(arguments, zygote, workplace, isolation)
        report.write(directory)
    print(f"\n{report.markdown()}")
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
