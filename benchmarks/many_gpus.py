"""Several GPUs of one host: topologies, a target over several cards, RPC between cards, sharded trainers.

    python benchmarks/many_gpus.py --out DIR [--parts 1 2 3 4] [--minutes 9] [--seconds 240]
    python benchmarks/many_gpus.py --out DIR --parts 1 --minutes 30 --seconds 1200      20 minutes with a kill
    python benchmarks/many_gpus.py --out DIR --parts 1 2 3 --device cpu --shapes small      a try on a CPU

Part 1: trained tokens/s of targets x trainers (1 x 1; 2 x 2, 1 x 3 and 3 x 1 with 4 cards; 4 x 4, 2 x 6 and 1 x 7
with 8), the waits of both sides, and each half alone; then 2 x 2 while a target is killed and restarted.
Part 2: a target over 2 and 4 cards in bf16 and fp8, alone and with one and two trainers, beside tensor parallelism.
Part 3: GB/s by size between pairs of cards, all at once: torch's RPC, NCCL, copies.
Part 4: trainers of a large draft on 1, 2 and 4 cards with whole and sharded state, at 4 x 2048 and 1 x 131,072.

Parts 1 to 3 have Llama-3.1-8B's and -70B's shapes and random weights. A run that needs more cards than there are
is skipped, and DIR/many_gpus.md says so. A run is given up when --minutes are over, and does not begin shortly
before. What has figures in DIR/many_gpus.json is not repeated: the same command again goes on. NVLink multicast
stays as the environment sets it. On a CPU processes take the places of cards, so its figures say nothing about GPUs.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from many_lab.plan import WORKS, Lab, Run, count_cards
from many_lab.report import report
from many_lab.scripts import divided_target_runs, pair_runs, sharded_runs
from many_lab.topologies import divided_runs, topology_runs
from measuring import arguments_of, environment

PARTS = (1, 2, 3, 4)
# A run begins if this share of its bound is left: most take less.
_ENOUGH = 0.6
# What decides whether NVLink multicast is used; the machine sets it.
_MULTICAST = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS")


def all_runs(lab: Lab) -> list[Run]:
    """Every run of every part, whatever this machine can do."""
    return [
        *topology_runs(lab),
        *divided_target_runs(lab.work.quantizations),
        *divided_runs(),
        *pair_runs(),
        *sharded_runs((lab.work.size, lab.work.longest)),
    ]


class Results:
    """All runs so far, in a file that is written after each, with a page beside it."""

    def __init__(self, directory: Path, lab: Lab) -> None:
        self._directory = directory
        self._path = directory / "many_gpus.json"
        kept = json.loads(self._path.read_text()) if self._path.exists() else {"runs": {}}
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if lab.on_gpus else None
        settings = {name: os.environ[name] for name in _MULTICAST if name in os.environ}
        machine = {**environment(torch.device(lab.device)), "cards": lab.cards, "nccl": nccl}
        self._content: dict[str, Any] = {**machine, "environment": settings, "runs": kept["runs"]}

    def has(self, run: Run) -> bool:
        """Whether there are figures of it."""
        return "figures" in self._content["runs"].get(run.key, {})

    def add(self, run: Run, **outcome: Any) -> None:
        """`figures`, or `why` there are none."""
        entry = {"part": run.part, "name": run.name, "cards": run.cards, **outcome}
        self._content["runs"][run.key] = entry
        self._directory.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        page = self._directory / "many_gpus.md"
        page.write_text(report(self._content), encoding="utf-8")
        print(f"{run.key}: {outcome}", flush=True)


def carry_out(run: Run, lab: Lab, results: Results, logs: Path, left: float) -> bool:
    """Whether it did not fail. A run that this machine or the time does not allow is told and does not count."""
    if results.has(run):
        return True
    if missing := run.missing(lab):
        results.add(run, why=missing)
        return True
    if left < _ENOUGH * run.seconds:
        results.add(run, why="no time was left: the same command goes on with it")
        return True
    directory = logs / re.sub(r"[^\w.]+", "_", run.key)
    directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        figures = run.measure(lab, min(run.seconds, left), directory)
    except Exception as error:  # noqa: BLE001 - the other runs go on, and the page says why
        results.add(run, why=f"failed after {time.monotonic() - started:.0f} s: {error}"[:2000])
        return False
    results.add(run, figures=figures, took=time.monotonic() - started)
    return True


def main() -> None:
    options = parse_options()
    lab = Lab(
        device=options.device,
        cards=count_cards(options.device) if options.cards is None else options.cards,
        work=WORKS[options.shapes],
        seconds=options.seconds,
    )
    results = Results(options.out, lab)
    deadline = time.monotonic() + 60 * options.minutes
    runs = [run for run in all_runs(lab) if run.part in options.parts]
    good = [carry_out(run, lab, results, options.out / "logs", deadline - time.monotonic()) for run in runs]
    sys.exit(not all(good))


def parse_options() -> argparse.Namespace:
    parser = arguments_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", type=int, nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", default="published", choices=WORKS)
    parser.add_argument("--cards", type=int, help="that runs may use; of GPUs all, on a CPU 2 processes")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this command")
    parser.add_argument("--seconds", type=float, default=240.0, help="of the run in which a target is killed")
    options = parser.parse_args()
    options.out = options.out.resolve()
    return options


if __name__ == "__main__":
    main()
