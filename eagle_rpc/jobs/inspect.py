"""`job=inspect`: shows what training would see, and needs neither weights nor RPC."""

import sys
from pathlib import Path

from rich.console import Console

from eagle_rpc.config import Config
from eagle_rpc.data.inspection import inspect_data
from eagle_rpc.jobs.draft_form import draft_vocab_size
from eagle_rpc.jobs.inputs import load_inputs
from eagle_rpc.process.startup import start_worker
from eagle_rpc.report.inspection import print_inspection, write_page


def run(config: Config) -> int:
    """Prints the figures and writes the page `inspect.output`; 0. Raises as `load_inputs`."""
    start_worker(config, "inspect")
    inputs = load_inputs(config)
    inspection = inspect_data(
        inputs.data,
        inputs.training,
        inputs.template,
        config.data,
        target_vocab_size=inputs.shape.vocab_size,
        draft_vocab_size=draft_vocab_size(config, inputs.shape),
        num_samples=config.inspect.num_samples,
    )
    sources = [(path, counts.line(config.data.max_length)) for path, counts in inspection.sources]
    print_inspection(inspection, sources, Console(file=sys.stdout, highlight=False))
    output = Path(config.inspect.output)
    write_page(inspection, sources, config.run.name, output)
    sys.stdout.write(f"wrote {output}\n")
    return 0
