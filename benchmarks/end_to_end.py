"""What does it gain to take the target out of the trainer's process? Trained tokens a second of both.

    python benchmarks/end_to_end.py --target small --output benchmarks/results/NAME.json

*Co-located*: one process that runs the target and trains. *Remote*: a target process and a trainer process of one static
job. Both train the same draft on the same random tokens; they stand side by side, and take turns. On a CPU the co-located process has
the threads that the two remote ones have together. With --trainer-device the remote trainer has a GPU of its own, and the co-located
process still one.

For both: tokens trained a second, the share of its time that the trainer waits for supervision (co-located: that it spends on
it), and the share in which the target's forward thread has no work. On a GPU that thread runs ahead of the device, so there its
share says how long no request was waiting, not that the GPU was idle. Medians over repetitions.

    python benchmarks/end_to_end.py --target llama --device cuda:0 --output FILE.json     # one GPU of 80 GB
    python benchmarks/end_to_end.py --target llama --device cuda:0 --trainer-device cuda:1  # two of them
    python benchmarks/end_to_end.py --target small --repetitions 1 --steps 2               # a smoke test
"""

import argparse
import contextlib
import json
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from peers.processes import Command, Process, free_port, running, static_environment
from peers.reporting import processor


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A target and the work on it, as `python -m eagle_rpc` takes them."""

    overrides: tuple[str, ...]
    size: str  # B x T of a micro-batch
    draft_vocab_size: int


def random_llama(**fields: Any) -> tuple[str, ...]:
    described = {"model_type": "llama", "tie_word_embeddings": False, **fields}
    return tuple(f"++target.random.{name}={value}" for name, value in described.items())


SETTINGS = {
    "small": Setting(
        overrides=(
            *random_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, vocab_size=32000),
            *random_llama(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096),
            "target.dtype=float32",
        ),
        size="4x256",
        draft_vocab_size=8192,
    ),
    "smollm2": Setting(overrides=("target=smollm2",), size="4x128", draft_vocab_size=8192),
    # meta-llama/Llama-3.1-8B-Instruct by its config, with random weights.
    "llama": Setting(
        overrides=(
            *random_llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256),
            *random_llama(num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072),
            "target.dtype=bfloat16",
        ),
        size="4x2048",
        draft_vocab_size=32000,
    ),
}


def overrides(arguments: argparse.Namespace, directory: str, threads: int, trainer_device: str) -> list[str]:
    setting = SETTINGS[arguments.target]
    batch_size, length = (arguments.size or setting.size).split("x")
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
        # A random target's most likely tokens are seldom in the draft vocabulary, a trained one's nearly always.
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

    def measure(self, *, warmups: int, steps: int, tokens_per_step: int) -> dict[str, float]:
        window = self._trainer.ask(warmups=warmups, steps=steps)
        seconds = window["ended"] - window["started"]
        figures = {
            "tokens_per_second": steps * tokens_per_step / seconds,
            "trainer_wait_share": window["waited"] / seconds,
        }
        for target in self._targets:
            figures["target_idle_share"] = target.ask(started=window["started"], ended=window["ended"])[
                "idle_share"
            ]
        return figures | {"trainer_peak_gib": window["peak_bytes"] / 2**30}


@contextlib.contextmanager
def both_ways(arguments: argparse.Namespace, directory: Path) -> Iterator[dict[str, Contestant]]:
    port = free_port()

    def command(role: str, threads: int, environment: dict[str, str], trainer_device: str) -> Command:
        settings = overrides(arguments, str(directory / role), threads, trainer_device)
        argv = [sys.executable, "-m", "peers.training", role, *settings]
        return Command(role, argv, {**environment, "OMP_NUM_THREADS": str(threads)}, answers=True)

    half = max(1, arguments.threads // 2)
    device = arguments.trainer_device or arguments.device
    roles = enumerate(("target", "trainer"))
    target, trainer = (command(role, half, static_environment(rank, 2, port), device) for rank, role in roles)
    colocated = command("colocated", 2 * half, {}, arguments.device)
    # All at once: a large target takes minutes to load.
    with running([target, colocated], trainer, directory, start_timeout=arguments.start_timeout) as (
        (server, alone),
        client,
    ):
        alone.answer(arguments.start_timeout)
        yield {"co-located": Contestant([], alone), "remote": Contestant([server], client)}


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| way | trained tokens/s (range) | against co-located | trainer waits | target idle |",
        "|---|---|---|---|---|",
    ]
    medians = {
        name: {figure: statistics.median(run[figure] for run in of) for figure in of[0]}
        for name, of in runs.items()
    }
    for name, figures in medians.items():
        rates = [run["tokens_per_second"] for run in runs[name]]
        ratio = figures["tokens_per_second"] / medians["co-located"]["tokens_per_second"]
        idle = (
            f"{figures['target_idle_share']:.0%}"
            if "target_idle_share" in figures
            else "as long as the trainer trains"
        )
        lines.append(
            f"| {name} | {figures['tokens_per_second']:,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {ratio:.2f} "
            f"| {figures['trainer_wait_share']:.0%} | {idle} |"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=list(SETTINGS), default="small")
    parser.add_argument("--device", default="cpu", help="of both ways, as train.device takes it")
    parser.add_argument("--trainer-device", help="of the remote trainer, if it is another")
    parser.add_argument("--size", help="rows x tokens of a micro-batch; the target's own by default")
    parser.add_argument("--draft-vocab-size", type=int)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--encoding", default="hidden", choices=["hidden", "logits", "probs"])
    parser.add_argument("--prefetch", type=int, default=4)
    parser.add_argument(
        "--threads", type=int, default=psutil.cpu_count(logical=False) or 2, help="of each way"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=2, help="optimiser steps before each measurement")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of a measurement")
    parser.add_argument("--start-timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("--override", nargs="*", default=[], help="further settings of Hydra, for both ways")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    rows, length = map(int, (arguments.size or SETTINGS[arguments.target].size).split("x"))
    runs: dict[str, list[dict[str, float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="end-to-end-") as directory,
        both_ways(arguments, Path(directory)) as contestants,
    ):
        for repetition in range(arguments.repetitions):
            for name, contestant in contestants.items():
                figures = contestant.measure(
                    warmups=arguments.warmups,
                    steps=arguments.steps,
                    tokens_per_step=rows * length * arguments.accumulation,
                )
                runs.setdefault(name, []).append(figures)
                print(
                    f"{repetition + 1}/{arguments.repetitions} {name}: {figures['tokens_per_second']:,.0f} tokens/s",
                    flush=True,
                )
    print(f"\n{table(runs)}")
    if arguments.output:
        arguments.output.write_text(
            json.dumps({**environment(arguments), "runs": runs}, indent=1) + "\n", encoding="utf-8"
        )


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": str(date.today()),
        "device": processor() if arguments.device == "cpu" else torch.cuda.get_device_name(arguments.device),
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": shlex.join(["python", "benchmarks/end_to_end.py", *sys.argv[1:]]),
    }


if __name__ == "__main__":
    main()
