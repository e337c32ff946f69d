"""`job=evaluate`: what decoding of held-out prompts with an exported draft accepts."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from eagle_rpc.config import Config
from eagle_rpc.evaluate import evaluate_draft, read_prompts
from eagle_rpc.jobs.assembly import chat_template
from eagle_rpc.jobs.prompts import ensure_prompts
from eagle_rpc.process.startup import start_worker
from eagle_rpc.report.plots import plot_acceptance, plot_loss
from eagle_rpc.serving import load_export
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.loading import load_with_tokenizer
from eagle_rpc.topology import resolve_device
from eagle_rpc.train import RunDirectory


def run(config: Config) -> int:
    """Writes `evaluation.json` and the plots; 1 if real decoding differs, near-ties aside."""
    start_worker(config, "evaluate")
    ensure_prompts(config)
    settings, directory = config.evaluate, RunDirectory.of(config)
    export = load_export(Path(settings.draft))
    target = replace(config.target, dtype=settings.dtype)
    device = torch.device(resolve_device(target.device))
    model, tokenizer = load_with_tokenizer(target, device, cache_dir=config.run.cache_dir)
    shape = TargetShape.of(model.config)
    context = shape.context or shape.length(target.max_length)
    result = evaluate_draft(
        model,
        export,
        read_prompts(config, chat_template(config, tokenizer), context),
        settings,
        tokenizer=tokenizer,
    )
    result.write(directory.evaluation)
    plot_acceptance(result.acceptance_per_position, result.accept_length, directory.acceptance_plot)
    files = [Path(settings.draft), directory.evaluation, directory.acceptance_plot]
    if directory.metrics.exists():
        plot_loss(directory.metrics, directory.loss_plot)
        files.append(directory.loss_plot)
    sys.stdout.write(result.summary() + "".join(f"wrote {file}\n" for file in files))
    return 0 if result.identical_texts and result.counts_agree else 1
