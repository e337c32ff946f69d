"""A trainer that only takes batches and writes their times: the pauses show the cost of a target's death."""

import os
import struct
import sys
import time
from pathlib import Path

import torch
from support.trainer import compose, elastic_trainer

from eagle_rpc.config import Config
from eagle_rpc.data import BatchPlan, datasets_of, load_data
from eagle_rpc.jobs.assembly import chat_template, plan_batches
from eagle_rpc.supervision import VocabMapping
from eagle_rpc.target.model_files import load_target_shape, load_tokenizer

_TIME = struct.Struct("<d")


def main() -> None:
    """Arguments: the file of times, the seconds of training on each batch, and the overrides of `job=train`."""
    times, seconds, *overrides = sys.argv[1:]
    config = compose(overrides)
    plan, mapping = data_of(config)
    with elastic_trainer(config) as (membership, target):
        target.open_session(mapping)
        membership.report(target.status)
        with Path(times).open("ab", buffering=0) as file:
            for _ in target.stream(plan.batches()):
                file.write(_TIME.pack(time.monotonic()))
                time.sleep(float(seconds))


def data_of(config: Config) -> tuple[BatchPlan, VocabMapping]:
    """The batches of `job=train`; the draft vocabulary is the first ids of the target's."""
    template = chat_template(config, load_tokenizer(config.target, cache_dir=config.run.cache_dir))
    data = load_data(config.data, template, cache_dir=config.run.cache_dir, show_progress=False)
    training, _ = datasets_of(config.data, data)
    vocab_size = load_target_shape(config.target, cache_dir=config.run.cache_dir).vocab_size
    mapping = VocabMapping.from_token_ids(torch.arange(config.draft.vocab_size), vocab_size)
    return plan_batches(config, training), mapping


def read_times(path: Path) -> list[float]:
    """The time of each batch so far, in seconds of time.monotonic, which all processes of a machine share."""
    data = path.read_bytes() if path.exists() else b""
    complete = len(data) - len(data) % _TIME.size
    return [moment for (moment,) in _TIME.iter_unpack(data[:complete])]


def num_times(path: Path) -> int:
    """The number of batches so far."""
    return os.stat(path).st_size // _TIME.size if path.exists() else 0
