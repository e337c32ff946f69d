"""Shared by benchmarks: arguments, times, memory peaks, a ceiling, medians, environment and results."""

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import processes  # It puts `support` on the path.
import torch
import transformers
from support.reporting import processor

__all__ = ["processes"]
GIB = 2**30


def synchronise(device: torch.device) -> None:
    """Waits for the device's queued work; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(run: Callable[[], Any], *, repeats: int, warmups: int, device: torch.device) -> float:
    """The median time of one run: by events around it on a GPU, by the clock on a CPU."""
    for _ in range(warmups):
        run()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            torch.cuda.synchronize(device)
            seconds.append(before.elapsed_time(after) / 1e3)
        else:
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def matrix_ceiling(device: torch.device, *, size: int = 8192) -> float:
    """TFLOP/s of a bf16 product of two square matrices of `size`."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, repeats=9, warmups=3, device=device) / 1e12


def measure(
    run: Callable[[], Any], tokens: int, flops: float, ceiling: float, *, slow: bool, device: torch.device
) -> dict[str, float]:
    """Throughput of `run`, which has run before; on a GPU also its peak of memory above the resident bytes."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        resident = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    # Long runs vary little and cost time.
    seconds = median_seconds(run, repeats=7 if slow else 15, warmups=2 if slow else 3, device=device)
    rate = tokens / seconds
    figures = {
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": rate,
        "teraflops": rate * flops / 1e12,
        "share_of_ceiling": rate * flops / 1e12 / ceiling,
    }
    if on_gpu:
        run()
        figures |= clock_and_power(device)
        torch.cuda.synchronize(device)
        figures["peak_gib_over_resident"] = (torch.cuda.max_memory_allocated(device) - resident) / GIB
        figures["resident_gib"] = resident / GIB
    return figures


def clock_and_power(device: torch.device) -> dict[str, float]:
    """The GPU's current clock and power, where its management library is installed: it lowers its clock under load."""
    with contextlib.suppress(ModuleNotFoundError):
        return {
            "megahertz": float(torch.cuda.clock_rate(device)),
            "watts": torch.cuda.power_draw(device) / 1e3,
        }
    return {}


def kernel_times(
    run: Callable[[], Any], kinds: Sequence[tuple[str, tuple[str, ...]]]
) -> tuple[dict[str, float], list[str]]:
    """Milliseconds on the GPU of one run by kind of kernel, and the kernels that take longest, one a line.

    `kinds`: a kind, and parts of its kernels' names; the first match counts.
    """
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    for event in events:
        kind = next((kind for kind, signs in kinds if any(sign in event.key for sign in signs)), "other")
        times[kind] = times.get(kind, 0.0) + event.self_device_time_total / 1e3
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:25]
    return times, [
        f"{event.self_device_time_total / 1e3:8.2f} ms {event.count:4d} x {event.key[:110]}"
        for event in longest
    ]


def command_line() -> str:
    """The command that started this benchmark, from the repository's root."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def environment(device: torch.device) -> dict[str, Any]:
    return {
        "date": str(date.today()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": command_line(),
    }


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the benchmark's docstring as it stands."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


def size_of(name: str) -> tuple[int, int]:
    """Rows and tokens of "4x2048"."""
    rows, length = map(int, name.split("x"))
    return rows, length


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over several runs."""
    return {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}


class Results:
    """Prints each new entry and rewrites the file, so that an interrupted run keeps its results."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self._path = path
        self._content: dict[str, Any] = {**environment(device), "runs": []}

    def add(self, **entry: Any) -> None:
        self._content["runs"].append(entry)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        print(
            " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in entry.items()),
            flush=True,
        )
