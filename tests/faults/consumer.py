"""A trainer that only takes batches and notes when: what a target's death costs it shows in the pauses between them."""

import contextlib
import os
import struct
import sys
import threading
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from eagle_rpc.client import RemoteEagle3TargetModel
from eagle_rpc.config import Config
from eagle_rpc.config.compose import conf_dir, register_schema, to_config
from eagle_rpc.data import BatchPlan, ChatTemplate, build_vocab_mapping, load_datasets
from eagle_rpc.jobs.assembly import connect_target, plan_batches
from eagle_rpc.jobs.elastic_worker import announced
from eagle_rpc.jobs.permissions import trainer_permissions
from eagle_rpc.process import read_world
from eagle_rpc.process.startup import start_worker
from eagle_rpc.rpc import ElasticMembership
from eagle_rpc.supervision import VocabMapping
from eagle_rpc.target.loading import load_target_config, load_tokenizer
from eagle_rpc.topology import Role, assign_elastic_roles

_TIME = struct.Struct("<d")


def main() -> None:
    """Arguments: the file of times, the seconds that each batch is trained on, and the overrides of a `job=train`."""
    times, seconds, *overrides = sys.argv[1:]
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = to_config(compose("config", overrides))
    cast = assign_elastic_roles(Role.trainer, config.topology, read_world())
    start_worker(config, cast.me.name)
    device, stop = torch.device("cpu"), threading.Event()
    plan, mapping = data_of(config)
    permissions = trainer_permissions(config.rpc)
    with (
        announced(
            config, cast.me.name, Role.trainer, device, permissions, stop, when_superseded=stop.set
        ) as membership,
        contextlib.closing(
            connect_target(
                config,
                load_target_config(config.target, cache_dir=config.run.cache_dir),
                load_tokenizer(config.target, cache_dir=config.run.cache_dir),
                device,
                cast,
                membership,
                stop,
            )
        ) as backend,
    ):
        consume(backend, membership, plan, mapping, Path(times), float(seconds))


def data_of(config: Config) -> tuple[BatchPlan, VocabMapping]:
    tokenizer = load_tokenizer(config.target, cache_dir=config.run.cache_dir)
    training, _ = load_datasets(
        config.data, ChatTemplate(tokenizer, config.data.chat_template), show_progress=False
    )
    vocab_size = load_target_config(config.target, cache_dir=config.run.cache_dir).vocab_size
    mapping, _ = build_vocab_mapping(
        training,
        tokenizer=tokenizer,
        target_vocab_size=vocab_size,
        draft_vocab_size=config.draft.vocab_size,
        cache_dir=config.run.cache_dir,
    )
    return plan_batches(config, training), mapping


def consume(
    backend: RemoteEagle3TargetModel,
    membership: ElasticMembership,
    plan: BatchPlan,
    mapping: VocabMapping,
    times: Path,
    seconds: float,
) -> None:
    backend.open_session(mapping)
    membership.report(backend.status)
    with times.open("ab", buffering=0) as file:
        for _ in backend.stream(plan.batches()):
            file.write(_TIME.pack(time.monotonic()))
            time.sleep(seconds)


def read_times(path: Path) -> list[float]:
    """Seconds of time.monotonic, which all processes of a machine share; of each batch so far."""
    data = path.read_bytes() if path.exists() else b""
    whole = len(data) - len(data) % _TIME.size
    return [moment for (moment,) in _TIME.iter_unpack(data[:whole])]


def num_times(path: Path) -> int:
    """Batches so far."""
    return os.stat(path).st_size // _TIME.size if path.exists() else 0
