"""For all tests: the packages `support` and `faults` on the path, one thread, no network."""

import os
import sys
from pathlib import Path

# Before transformers is imported, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)
