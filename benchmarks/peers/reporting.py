"""The report of a transport comparison."""

import subprocess

import psutil
import torch
from measuring import command_line, environment
from peers.comparison import Difference, Measurement
from peers.work import Work
from support.reporting import table


def tables(measurement: Measurement) -> str:
    first = next(iter(measurement.outcomes))
    figures = ("seconds", "bytes", "tokens_per_second", "server_cpu", "client_cpu")
    speeds = []
    for name in measurement.outcomes:
        seconds, size, rate, server_cpu, client_cpu = (measurement.median(name, one) for one in figures)
        ratio, lowest, highest = measurement.ratio(name)
        against, cpu = f"{ratio:.2f} ({lowest:.2f} to {highest:.2f})", f"{server_cpu:.3f} + {client_cpu:.3f}"
        speeds.append((name, f"{seconds:.3f}", f"{size / 1e6:.2f}", f"{rate:,.0f}", against, cpu))
    header = ("side", "s/request", "MB/request", "supervised tokens/s", f"against {first} (range)")
    rest = []
    for name, idle in measurement.idle.items():
        shares = ", ".join(f"{process} {100 * share:.1f}" for process, share in idle.items())
        rest.append((name, shares, describe(measurement.differences.get(name))))
    header_of_rest = ("side", "idle, % of a core", f"probabilities, hidden states, mask against {first}")
    speed_table = table((*header, "CPU s/request, service + client"), speeds)
    return f"{speed_table}\n\n{table(header_of_rest, rest)}"


def describe(difference: Difference | None) -> str:
    if difference is None:
        return "the reference"
    return f"{difference.probs:.1e}, {difference.aux:.1e}, {difference.mask_entries} entries differ"


def report(measurement: Measurement, work: Work, *, num_requests: int, peer_python: str | None) -> str:
    """Markdown: hardware, versions, the work, the figures and the command."""
    batches, _ = work.load_tokens()
    here = environment(torch.device("cpu"))
    total = sum(batch["input_ids"].numel() for batch in batches)
    real, selected = (
        sum(int(batch[name].sum()) for batch in batches) for name in ("attention_mask", "loss_mask")
    )
    repetitions = min(len(outcomes) for outcomes in measurement.outcomes.values())
    return f"""# Transport of supervision, {here["date"]}

{here["device"]}, {here["cores"]} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, loopback.
Python {here["python"]}, torch {here["torch"]}, transformers {here["transformers"]}.
{f"Peer: {peer_versions(peer_python)}." if peer_python else "No peer was given: this package alone."}

Target: random Llama, H {work.hidden_size}, {work.layers} layers, vocabulary {work.vocab_size},
draft vocabulary {work.draft_vocab_size}, {work.dtype}.
Requests: {work.batch_size} x {work.length}, {real / total:.0%} of them real tokens, {selected / real:.0%}
of these in the loss mask; {work.prefetch} under way. One thread a process.
{repetitions} repetitions of {num_requests} requests, in turns; medians.

{tables(measurement)}

Supervised tokens are the rows that `position_mask` selects. The clients read all their
probabilities and do nothing else.

    {command_line()}
"""


def peer_versions(python: str) -> str:
    """The versions of the peer's packages in the environment of `python`."""
    packages = ("nemo-automodel", "torch", "transformers")
    listed = f"(f'{{name}} {{version(name)}}' for name in {packages})"
    script = f"from importlib.metadata import version; print(*{listed}, sep=', ')"
    return subprocess.run(
        [python, "-c", script], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()
