"""Makes the page of families: `python docs/generate_targets.py > docs/targets.md`, in a quarter of an hour."""

import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.families import family_names
from support.family_jobs import try_all
from support.family_page import page

if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sys.stdout.write(page(try_all(family_names()), version=transformers.__version__))
