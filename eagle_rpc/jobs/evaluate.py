"""`job=evaluate`: what decoding of held-out prompts with an exported draft accepts."""

import sys
from pathlib import Path

from eagle_rpc.config import Config
from eagle_rpc.evaluate import evaluate_draft
from eagle_rpc.jobs.decoding import load_decoding
from eagle_rpc.jobs.report import make_report
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.process.startup import start_worker
from eagle_rpc.report.plots import plot_acceptance, plot_loss
from eagle_rpc.serving import load_export
from eagle_rpc.serving.model_card import write_measured


def run(config: Config) -> int:
    """Writes `evaluation.json` and the plots; 1 if real decoding differs, near-ties aside."""
    start_worker(config, "evaluate")
    settings, directory = config.evaluate, RunDirectory.of(config)
    export = load_export(Path(settings.draft))
    model, tokenizer, prompts = load_decoding(config)
    result = evaluate_draft(
        model,
        export,
        [one.token_ids for one in prompts],
        settings,
        categories=[one.category for one in prompts],
        tokenizer=tokenizer,
    )
    result.write(directory.evaluation)
    write_measured(Path(settings.draft), result.card_figures())
    plot_acceptance(result.acceptance_per_position, result.accept_length, directory.acceptance_plot)
    files = [Path(settings.draft), directory.evaluation, directory.acceptance_plot]
    if directory.metrics.exists():
        plot_loss(directory.metrics, directory.loss_plot)
        files.append(directory.loss_plot)
    sys.stdout.write(result.summary() + "".join(f"wrote {file}\n" for file in files) + make_report(config))
    return 0 if result.is_confirmed else 1
