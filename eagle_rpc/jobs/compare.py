"""`job=compare`: what decoding of the same held-out prompts accepts with each of several drafts."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eagle_rpc.config import Config
from eagle_rpc.evaluate import Comparison, compare_drafts
from eagle_rpc.jobs.decoding import load_decoding
from eagle_rpc.jobs.report import make_report
from eagle_rpc.process.startup import start_worker
from eagle_rpc.serving import load_export
from eagle_rpc.target.stop_tokens import stop_token_ids


def run(config: Config) -> int:
    """Prints a table and writes `compare.output`; 0. Raises as `load_export` and `compare_drafts`."""
    start_worker(config, "compare")
    drafts = {path: load_export(Path(path).expanduser()) for path in config.compare.drafts}
    model, tokenizer, prompts = load_decoding(config)
    comparison = compare_drafts(
        model,
        drafts,
        [one.token_ids for one in prompts],
        config.evaluate,
        categories=[one.category for one in prompts],
        stop_token_ids=stop_token_ids(model.config, model.generation_config, tokenizer),
    )
    comparison.write(Path(config.compare.output))
    print_comparison(comparison, Console(file=sys.stdout, highlight=False))
    sys.stdout.write(f"wrote {config.compare.output}\n" + make_report(config))
    return 0


def print_comparison(comparison: Comparison, console: Console) -> None:
    """A column for each draft."""
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for draft in comparison.drafts:
        table.add_column(f"{draft.directory}\n{draft.parameters / 1e6:.1f} M parameters", overflow="fold")
    for title, cells in comparison.rows():
        table.add_row(title, *cells)
    console.print(table)
    console.print(
        f"tokens a target call over {comparison.num_prompts} prompts ({comparison.num_tokens} tokens of the "
        "target), with 95 % intervals over prompts"
    )
