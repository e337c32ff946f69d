"""Fault tests: kills, stops, cuts and garbage against a running elastic service.

Training must end with the same bits as without faults, and go on soon. From the repository's root:

    python -m tests.faults list                                           the kinds of faults, a line each
    python -m tests.faults run --minutes 30 --faults 500 --seed 1         training under a schedule of faults
    python -m tests.faults run --stages 2 --minutes 0 --faults 20 --faults-per-run 20    kills of stages of a target
    python -m tests.faults stalls                                         the trainer's wait after a kill of a target
    python -m tests.faults rolling --targets 4 --trainers 8               a rolling restart of all targets
    python -m tests.faults soak --minutes 120                             targets and trainers come and go for hours
    python -m tests.faults cycles --count 300                             starts and stops in every mode

Everything runs on loopback with a tiny model. As root, the tests run in a network and a /dev/shm of their
own; otherwise they leave out the faults that need that, and say so.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# `faults` and `support` are found beside each other, as the other tests find them.
sys.path.insert(0, str(Path(__file__).parents[1]))

from support.processes import ended_at_last

from faults import cycles, rolling, run, soak, stalls
from faults.isolation import Isolation, isolate
from faults.kinds import KINDS
from faults.report import Report
from faults.workspace import Workspace
from faults.zygote import Zygote


@contextlib.contextmanager
def prepared(directory: Path) -> Iterator[tuple[Zygote, Workspace, Isolation]]:
    """A workspace with a model, isolated where that is permitted, and a zygote that starts workers in it."""
    isolation = isolate()
    if isolation.note:
        print(isolation.note, flush=True)
    workspace = Workspace(directory).prepare()
    with Zygote(directory, workspace.environment) as zygote:
        log = workspace.logs / "model.log"
        maker = zygote.fork("faults.workspace:make_model", [str(workspace.model)], log=log)
        with ended_at_last(lambda: [maker]):
            if not maker.ends(within=60) or maker.poll() != 0:
                raise RuntimeError(f"the model was not made: {maker.end_of_log()}")
        yield zygote, workspace, isolation


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    commands.add_parser("list", help="print the kinds of faults").set_defaults(run=None)
    tests = {"run": run, "stalls": stalls, "rolling": rolling, "soak": soak, "cycles": cycles}
    for name, module in tests.items():
        command = commands.add_parser(name, help=str(module.__doc__).partition(": ")[2])
        module.add_arguments(command)
        command.add_argument("--seed", type=int, default=1)
        command.add_argument(
            "--output", type=Path, help="new directory for record, report and logs (default: none)"
        )
        command.set_defaults(run=module.run)
    return parser.parse_args()


def main() -> int:
    """0 if every check holds."""
    arguments = parse_arguments()
    if arguments.run is None:
        print("\n".join(f"{kind.name}: {kind.effect}" for kind in KINDS))
        return 0
    if arguments.output and arguments.output.exists():
        raise SystemExit(f"--output must be a new directory, {arguments.output} exists")
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-"))
        directory = (arguments.output or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        with prepared(directory / "workspace") as (zygote, workspace, isolation):
            report: Report = arguments.run(arguments, zygote, workspace, isolation)
        report.write(directory)
    print(f"\n{report.markdown()}")
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
