"""What a running target tells of itself."""

import os
from pathlib import Path
from typing import Any

import torch

from eagle_rpc.service.reply_budget import ReplyBudget
from eagle_rpc.service.scheduler import ForwardScheduler
from eagle_rpc.service.sessions import SessionTable
from eagle_rpc.service.throughput import Throughput

_STATM = Path("/proc/self/statm")


def describe_load(
    sessions: SessionTable, scheduler: ForwardScheduler, budget: ReplyBudget, throughput: Throughput
) -> dict[str, Any]:
    """What the target has to do and has done.

    `passes`: forward passes; `requests`: answers by outcome, `ok` or a
    failure's code; `tokens`: real tokens of the batches answered; `*_per_second`: over the last 10 s; `reply_bytes_held`:
    promised, or made and not yet sent; `lease_left`: seconds.
    """
    held = budget.held
    return {
        "draining": scheduler.draining,
        "queued": scheduler.num_queued,
        "running": scheduler.num_running,
        "passes": scheduler.num_passes,
        "sessions": [
            {
                "id": figures.session.id[:8],
                "job": figures.session.job,
                "trainer": figures.session.trainer,
                "encoding": figures.session.encoding,
                "queued": scheduler.num_queued_of(figures.session.job, figures.session.id),
                "lease_left": figures.lease_left,
                "requests": figures.num_requests,
                "tokens": figures.num_tokens,
                "reply_bytes_held": budget.held_of(figures.session.id),
            }
            for figures in sessions.figures()
        ],
        **throughput.status(),
        "reply_bytes_held": held,
    }


def describe_memory(device: torch.device) -> dict[str, int]:
    """`resident_bytes`: physical memory of this process, read as Linux tells it; `device_bytes`: allocated on a GPU, else 0."""
    return {
        "resident_bytes": int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "device_bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else 0,
    }
