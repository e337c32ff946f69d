"""What a run of `many_gpus.py` is, the work that runs share, and the table of runs that are to be done."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, overrides_of

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Shapes and sizes of all runs."""

    trained: str  # shape of the targets of part 1
    divided: str  # of those of part 2, and of the target of the drafts of part 4
    size: str  # B x T of a micro-batch
    longest: str  # of part 4
    draft_vocab_size: int
    dtype: str
    warmups: int  # optimiser steps before a measurement
    steps: int  # optimiser steps of a measurement
    requests: int  # of a target by itself
    messages: tuple[int, ...]  # bytes of a tensor of part 3
    quantizations: tuple[str | None, ...]  # of divided targets


WORKS = {
    "published": Work(
        trained="llama",
        divided="llama-70b",
        size="4x2048",
        longest="1x131072",
        draft_vocab_size=32000,
        dtype="bfloat16",
        warmups=4,
        steps=20,
        requests=30,
        messages=(2**16, 2**20, 2**24, 2**28),
        quantizations=(None, "fp8"),
    ),
    "small": Work(
        trained="small",
        # Tensor parallelism over four needs as many key heads.
        divided="medium",
        size="1x32",
        longest="1x64",
        draft_vocab_size=200,
        dtype="float32",
        warmups=1,
        steps=2,
        requests=2,
        messages=(2**10, 2**16),
        quantizations=(None,),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Lab:
    """The machine and the work."""

    device: str  # cpu or cuda
    cards: int  # GPUs; on a CPU processes take their places
    work: Work
    seconds: float  # of an endurance run

    @property
    def on_gpus(self) -> bool:
        return self.device == "cuda"

    def overrides(self, shape: str, directory: Path) -> list[str]:
        """The settings of `python -m eagle_rpc` for targets of this shape and their trainers."""
        rows, length = self.work.size.split("x")
        device = "auto" if self.on_gpus else "cpu"
        return [
            "job=train",
            *overrides_of(SHAPES[shape]),
            f"target.dtype={self.work.dtype}",
            *([f"target.compile_shapes=[{self.work.size}]"] if self.on_gpus else []),
            f"target.device={device}",
            f"train.device={device}",
            f"train.batch_size={rows}",
            f"data.max_length={length}",
            f"draft.vocab_size={self.work.draft_vocab_size}",
            "draft.ttt_steps=7",
            "supervision.rows=loss_mask",
            "rpc.model_timeout=500",
            f"run.dir={directory}/run",
            f"run.cache_dir={directory}/cache",
            "run.threads=1",
        ]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measurement."""

    part: int
    name: str
    cards: int  # that it needs
    seconds: float  # that it takes at most
    measure: Callable[[Lab, float, Path], Figures]
    """Of the lab, its bound in seconds, and a directory of its own for logs. Raises what fails."""
    gpus_alone: str = ""
    """Why it does not run on a CPU; empty: it does."""

    @property
    def key(self) -> str:
        return f"{self.part}: {self.name}"

    def missing(self, lab: Lab) -> str:
        """Why this machine cannot run it; empty: it can."""
        if self.gpus_alone and not lab.on_gpus:
            return self.gpus_alone
        if self.cards > lab.cards:
            return f"needs {self.cards} GPUs, this machine has {lab.cards}"
        return ""


def count_cards(device: str) -> int:
    """GPUs of this host; on a CPU two, which processes stand for."""
    return torch.cuda.device_count() if device == "cuda" else 2
