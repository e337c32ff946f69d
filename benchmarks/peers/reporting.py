"""The measurement as people read it."""

import platform
import subprocess
from datetime import date
from pathlib import Path

import psutil
import torch
import transformers
from peers.measuring import Difference, Measurement
from peers.work import Work


def tables(measurement: Measurement) -> str:
    first = next(iter(measurement.outcomes))
    lines = [
        f"| side | s/request | MB/request | supervised tokens/s | against {first} (range) | CPU s/request, service + client |",
        "|---|---|---|---|---|---|",
    ]
    for name in measurement.outcomes:
        seconds, size, rate, server_cpu, client_cpu = (
            measurement.median(name, figure)
            for figure in ("seconds", "bytes", "tokens_per_second", "server_cpu", "client_cpu")
        )
        ratio, lowest, highest = measurement.ratio(name)
        lines.append(
            f"| {name} | {seconds:.3f} | {size / 1e6:.2f} | {rate:,.0f} | {ratio:.2f} ({lowest:.2f} to {highest:.2f}) | "
            f"{server_cpu:.3f} + {client_cpu:.3f} |"
        )
    lines += [
        "",
        f"| side | idle, % of a core | probabilities, hidden states, mask against {first} |",
        "|---|---|---|",
    ]
    for name, idle in measurement.idle.items():
        shares = ", ".join(f"{process} {100 * share:.1f}" for process, share in idle.items())
        lines.append(f"| {name} | {shares} | {describe(measurement.differences.get(name))} |")
    return "\n".join(lines)


def describe(difference: Difference | None) -> str:
    if difference is None:
        return "the reference"
    return f"{difference.probs:.1e}, {difference.aux:.1e}, {difference.mask_entries} entries differ"


def report(
    measurement: Measurement, work: Work, *, num_requests: int, peer_python: str | None, command: str
) -> str:
    """Markdown: hardware, versions, the work, the figures, and the command that gives them."""
    batches, _ = work.load_tokens()
    total = sum(batch["input_ids"].numel() for batch in batches)
    real, selected = (
        sum(int(batch[name].sum()) for batch in batches) for name in ("attention_mask", "loss_mask")
    )
    repetitions = min(len(outcomes) for outcomes in measurement.outcomes.values())
    return f"""# Transport of supervision, {date.today()}

{processor()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, loopback.
Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.
{f"Peer: {peer_versions(peer_python)}." if peer_python else "No peer was given: this package alone."}

Target: random Llama, H {work.hidden_size}, {work.num_layers} layers, vocabulary {work.vocab_size},
draft vocabulary {work.draft_vocab_size}, {work.dtype}.
Requests: {work.batch_size} x {work.length}, {real / total:.0%} of them real tokens, {selected / real:.0%} of these in the loss mask;
{work.prefetch} under way. One thread a process. {repetitions} repetitions of {num_requests} requests, in turns; medians.

{tables(measurement)}

Supervised tokens are the rows that `position_mask` selects. The clients read all their probabilities and do nothing else.

    {command}
"""


def processor() -> str:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def peer_versions(python: str) -> str:
    """Those of the packages in the environment of `python`."""
    packages = ("nemo-automodel", "torch", "transformers")
    script = f"from importlib.metadata import version; print(*(f'{{name}} {{version(name)}}' for name in {packages}), sep=', ')"
    return subprocess.run(
        [python, "-c", script], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()
