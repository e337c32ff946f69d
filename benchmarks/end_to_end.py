"""The gain from a target outside the trainer's process: trained tokens per second of both ways.

    python benchmarks/end_to_end.py --target small --output benchmarks/results/NAME.json

*Co-located*: one process that runs the target and trains. *Remote*: a target process and a trainer process of
one static job. Both train the same draft on the same random tokens, in turns. On a CPU the co-located process
has the threads of the two remote ones together. With --trainer-device the remote trainer has its own GPU.

Figures of both: trained tokens per second, the trainer's share of time in waiting for supervision
(co-located: in making it), and the share in which the target's forward thread has no work. On a GPU that
thread runs ahead of the device: there its share is the time without a waiting request, not the GPU's idle
time. Medians over repetitions.

    python benchmarks/end_to_end.py --target llama --device cuda:0 --output FILE.json     # one GPU of 80 GB
    python benchmarks/end_to_end.py --target llama --device cuda:0 --trainer-device cuda:1  # two of them
    python benchmarks/end_to_end.py --target small --repetitions 1 --steps 2               # a smoke test
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from measuring import Results, arguments_of, medians, size_of
from processes import Process, python_module, running, static_job
from shapes import SHAPES, overrides_of
from support.reporting import table

HEADER = ("way", "trained tokens/s (range)", "against co-located", "trainer waits", "target idle")


@dataclass(frozen=True)
class Setting:
    """A target, as settings of `python -m eagle_rpc`, and its micro-batches."""

    overrides: tuple[str, ...]
    size: str  # B x T of a micro-batch
    draft_vocab_size: int


SETTINGS = {
    "small": Setting((*overrides_of(SHAPES["medium"]), "target.dtype=float32"), "4x256", 8192),
    "smollm2": Setting(("target=smollm2",), "4x128", 8192),
    "llama": Setting((*overrides_of(SHAPES["llama"]), "target.dtype=bfloat16"), "4x2048", 32000),
}


def overrides(arguments: argparse.Namespace, directory: str, threads: int, trainer_device: str) -> list[str]:
    setting = SETTINGS[arguments.target]
    batch_size, length = size_of(arguments.size or setting.size)
    return [
        "job=train",
        *setting.overrides,
        f"target.device={arguments.device}",
        f"train.device={trainer_device}",
        f"train.batch_size={batch_size}",
        f"train.accumulation={arguments.accumulation}",
        f"data.max_length={length}",
        f"draft.vocab_size={arguments.draft_vocab_size or setting.draft_vocab_size}",
        f"supervision={arguments.encoding}",
        # A random target's most likely tokens are seldom in the draft vocabulary, a trained one's nearly
        # always.
        "supervision.rows=loss_mask",
        f"supervision.prefetch={arguments.prefetch}",
        "topology=1x1",
        f"rpc.model_timeout={arguments.start_timeout}",
        f"run.dir={directory}/run",
        f"run.cache_dir={directory}/cache",
        f"run.threads={threads}",
        *arguments.override,
    ]


class Contestant:
    """Co-located or remote, started and ready."""

    def __init__(self, targets: list[Process], trainer: Process) -> None:
        self._targets, self._trainer = targets, trainer

    def measure(self, warmups: int, steps: int, tokens_per_step: int) -> dict[str, float]:
        window = self._trainer.ask(warmups=warmups, steps=steps)
        seconds = window["ended"] - window["started"]
        figures = {
            "tokens_per_second": steps * tokens_per_step / seconds,
            "trainer_wait_share": window["waited"] / seconds,
        }
        for target in self._targets:
            span = target.ask(started=window["started"], ended=window["ended"])
            figures["target_idle_share"] = span["idle_share"]
        return figures | {"trainer_peak_gib": window["peak_bytes"] / 2**30}


@contextlib.contextmanager
def both_ways(arguments: argparse.Namespace, directory: Path) -> Iterator[dict[str, Contestant]]:
    half, module, timeout = max(1, arguments.threads // 2), "end_to_end_worker", arguments.start_timeout
    device = arguments.trainer_device or arguments.device
    settings = overrides(arguments, str(directory / "remote"), half, device)
    target, trainer = static_job(module, *settings, threads=half, target_answers=True)
    settings = overrides(arguments, str(directory / "colocated"), 2 * half, arguments.device)
    threads = {"OMP_NUM_THREADS": str(2 * half)}
    colocated = python_module("colocated", module, "colocated", *settings, environment=threads, answers=True)
    # All at once: a large target takes minutes to load.
    with running([target, colocated], trainer, directory, start_timeout=timeout) as ((server, alone), client):
        alone.answer(timeout)
        yield {"co-located": Contestant([], alone), "remote": Contestant([server], client)}


def rows_of(runs: dict[str, list[dict[str, float]]]) -> Iterator[tuple[str, ...]]:
    """A row of the table for each way, with medians."""
    by_name = {name: medians(figures) for name, figures in runs.items()}
    for name, figures in by_name.items():
        rates = [run["tokens_per_second"] for run in runs[name]]
        rate, base = figures["tokens_per_second"], by_name["co-located"]["tokens_per_second"]
        share = figures.get("target_idle_share")
        idle = "as long as the trainer trains" if share is None else f"{share:.0%}"
        spread = f"{rate:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        yield name, spread, f"{rate / base:.2f}", f"{figures['trainer_wait_share']:.0%}", idle


def parse_arguments() -> argparse.Namespace:
    parser = arguments_of(__doc__)
    parser.add_argument("--target", choices=list(SETTINGS), default="small")
    parser.add_argument("--device", default="cpu", help="of both ways, as train.device takes it")
    parser.add_argument("--trainer-device", help="of the remote trainer, if it is another")
    parser.add_argument("--size", help="rows x tokens of a micro-batch; the target's own by default")
    parser.add_argument("--draft-vocab-size", type=int)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--encoding", default="hidden", choices=["hidden", "logits", "probs"])
    parser.add_argument("--prefetch", type=int, default=4)
    cores = psutil.cpu_count(logical=False) or 2
    parser.add_argument("--threads", type=int, default=cores, help="of each way")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=2, help="optimiser steps before each measurement")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of a measurement")
    parser.add_argument("--start-timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("--override", nargs="*", default=[], help="further settings of Hydra, for both ways")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    rows, length = size_of(arguments.size or SETTINGS[arguments.target].size)
    tokens_per_step = rows * length * arguments.accumulation
    results = Results(arguments.output, torch.device(arguments.device))
    runs: dict[str, list[dict[str, float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="end-to-end-") as directory,
        both_ways(arguments, Path(directory)) as contestants,
    ):
        for repetition in range(arguments.repetitions):
            for name, contestant in contestants.items():
                figures = contestant.measure(arguments.warmups, arguments.steps, tokens_per_step)
                runs.setdefault(name, []).append(figures)
                results.add(repetition=repetition + 1, way=name, **figures)
    print("\n" + table(HEADER, rows_of(runs)))


if __name__ == "__main__":
    main()
