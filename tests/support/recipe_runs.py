"""The recipes for large targets, run from answers to evaluation with a tiny random model of the same family."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.families import tiny_model
from support.published_shapes import PUBLISHED
from support.tiny_model import write_prompts
from support.tiny_tokenizer import CHATML, make_tiny_tokenizer

_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# Qwen3's way to leave out thinking: an empty thought that the prompt ends with.
_WITHOUT_THOUGHT = r"{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
_TEMPLATES = {"qwen3_8b": CHATML.removesuffix("{% endif %}") + _WITHOUT_THOUGHT}
# What a tiny model and few prompts need to be another; all else is the recipe's.
_TINY = [
    "data.max_length=96",
    "data.validation_share=0.2",
    "draft.vocab_size=64",
    "train.accumulation=2",
    "train.max_steps=2",
    "train.validation_batches=2",
    "regenerate.max_new_tokens=12",
    "evaluate.dtype=float32",
    "evaluate.num_prompts=3",
    "evaluate.max_new_tokens=8",
]
# Rows of 96 tokens, and one device without a server.
_ROWS = ["data.row_length=96"]
_OWN = {
    "gpt_oss_20b": ["data.bucket_lengths=[48,96]"],
    "llama31_70b": [*_ROWS, "topology.devices_per_target=1", "regenerate.backend=engine"],
}


def take_whole_path(
    recipe: str, directory: Path, *more: str, workers: int, sizes: Mapping[str, int] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs every job of the recipe in `directory`; returns the export's configuration and the evaluation.

    `more`: further overrides; `sizes`: fields of the tiny model's configuration.
    """
    tokenizer = make_tiny_tokenizer(_TEMPLATES.get(recipe, CHATML))
    model = tiny_model(
        PUBLISHED[recipe]["model_type"],
        vocab_size=len(tokenizer),
        num_hidden_layers=8,
        eos_token_id=tokenizer.eos_token_id,
        **(sizes or {}),
    )
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    prompts = write_prompts(directory / "prompts.jsonl", 12)
    named = [f"experiment={recipe}", "target.model=model"]
    asked = [f"regenerate.prompts={prompts}", f"evaluate.prompts={prompts}"]
    for job in ("regenerate", "train", "export", "evaluate"):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        words = [f"job={job}", *named, *asked, *_TINY, *_OWN.get(recipe, _ROWS), *more]
        done = subprocess.run(
            [sys.executable, *(torchrun if job == "train" else ()), "-m", "eagle_rpc", *words],
            cwd=directory,
            env=_ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    run = directory / "runs" / recipe
    files = (run / "export/config.json", run / "evaluation.json")
    exported, evaluation = (json.loads(file.read_text()) for file in files)
    return exported, evaluation
