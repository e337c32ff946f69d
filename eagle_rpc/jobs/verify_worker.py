"""A worker of one side of `job=verify`: trains a few steps on synthetic chats and records all bits."""

import contextlib
import json
import threading
from dataclasses import replace
from pathlib import Path

import torch

from eagle_rpc.config import Config
from eagle_rpc.config.choices import Encoding, VerifySide
from eagle_rpc.data import ChatDataset, Example
from eagle_rpc.jobs.assembly import (
    connect_target,
    join_group,
    make_draft,
    make_record,
    plan_batches,
)
from eagle_rpc.jobs.draft_form import draft_vocab_size
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.jobs.train import DONE, READY, serve_until_done
from eagle_rpc.process import bind_to_interface, read_world, stop_signals
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.process.startup import start_worker
from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.rpc import attempt_store, join_static
from eagle_rpc.supervision import Eagle3TargetBackend, SessionSettings, TargetShape, VocabMapping
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.topology import Cast, Role, Worker, assign_roles, plan_devices, resolve_device
from eagle_rpc.train import Trainer, TrainerGroup
from eagle_rpc.train.recording import RecordingBackend

_SHORTEST = 8  # tokens of a synthetic chat
_SUPERVISED_SHARE = 0.7
# Both sides sum over gloo: NCCL may give other bits, and co-located trainers on one GPU cannot use it.
_GROUP_DEVICE = torch.device("cpu")


def record_steps(config: Config) -> int:
    """Runs the role of this process on its side; returns 0."""
    with stop_signals() as stop:
        if config.job.verify_side is VerifySide.colocated:
            _record_colocated(config, stop)
        else:
            _record_remote(config, stop)
    return 0


def record_path(directory: Path, encoding: str, trainer: int) -> Path:
    return directory / encoding / f"trainer{trainer}.json"


def _record_colocated(config: Config, stop: threading.Event) -> None:
    world = read_world()
    names = tuple(f"trainer{index}" for index in range(world.size))
    cast = Cast(Worker(names[world.rank], frozenset([Role.trainer]), world.rank), (), names)
    start_worker(config, cast.me.name, workers_on_host=world.local_size)
    bind_to_interface(config.rpc.interface)
    device = torch.device(
        resolve_device(config.train.device, field="train.device", local_rank=world.local_rank)
    )
    store = attempt_store(world, timeout=config.rpc.start_timeout)
    target = HFEagle3TargetModel.load(
        config.target, device, cache_dir=config.run.cache_dir, seed=config.run.seed
    )
    shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
    with join_group(config, cast, store, _GROUP_DEVICE) as group:
        for encoding in config.job.verify_encodings:
            backend = ColocatedEagle3TargetModel(
                target,
                config.target,
                SessionSettings(encoding=encoding.name, rows=config.supervision.rows.value),
            )
            _train_and_record(config, encoding, shape, backend, group, device, stop)
        # The process that hosts the store has to end last.
        group.barrier("the other trainers to finish")


def _record_remote(config: Config, stop: threading.Event) -> None:
    world = read_world()
    cast = assign_roles(config.topology, world)
    start_worker(config, cast.me.name, workers_on_host=world.local_size)
    # Targets run on the devices of trainers, as on the co-located side.
    devices = plan_devices(cast, world, target=config.train.device, trainer=config.train.device)
    device = torch.device(devices.device)
    with join_static(cast, world, config.rpc, devices, permissions(config.rpc, None)) as membership:
        if cast.me.has(Role.target):
            serve_until_done(config, devices.devices, membership, stop)
            return
        membership.wait_for(cast.target_names, READY, timeout=config.rpc.model_timeout)
        shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
        with join_group(config, cast, membership.store, _GROUP_DEVICE) as group:
            for encoding in config.job.verify_encodings:
                of_encoding = replace(config, supervision=replace(config.supervision, encoding=encoding))
                backend = connect_target(of_encoding, shape, None, device, cast, membership, stop)
                _train_and_record(of_encoding, encoding, shape, backend, group, device, stop)
        membership.mark(DONE)


def _train_and_record(
    config: Config,
    encoding: Encoding,
    shape: TargetShape,
    backend: Eagle3TargetBackend,
    group: TrainerGroup,
    device: torch.device,
    stop: threading.Event,
) -> None:
    # Synthetic chats have no vocabulary that a trained draft could share.
    config = replace(config, draft=replace(config.draft, init_from=None))
    chats = synthetic_chats(config, shape.vocab_size)
    mapping = _random_mapping(shape.vocab_size, draft_vocab_size(config, shape), config.run.seed)
    path = record_path(RunDirectory.of(config).path, encoding.name, group.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    run = RunDirectory(path.parent)
    with contextlib.closing(RecordingBackend(backend)) as recording:
        recording.open_session(mapping)
        trainer = Trainer(
            config.train,
            config.draft,
            draft=make_draft(config, shape, recording, device),
            backend=recording,
            batches=plan_batches(config, chats, rank=group.rank, num_ranks=group.size),
            validation=None,
            num_draft_tokens=config.evaluate.num_draft_tokens,
            group=group,
            run=run,
            record=make_record(config, shape, recording, mapping),
            stop=stop,
        )
        trainer.train()
    metrics = list(read_metrics(run.metrics)) if group.is_primary else []
    used = config.job.verify_steps * config.train.accumulation
    record = {
        "supervision": recording.digests[:used],
        "rows": sum(recording.rows[:used]),
        "loss": [line["loss"] for line in metrics],
        "grad_norm": [line["grad_norm"] for line in metrics],
        "weights": trainer.learner.digest(),
    }
    path.write_text(json.dumps(record, indent=1))


def synthetic_chats(config: Config, vocab_size: int) -> ChatDataset:
    """Chats of random tokens and lengths, a function of the seed: about as many as the steps need."""
    draw = torch.Generator().manual_seed(config.run.seed)
    longest, train = config.data.max_length, config.train
    batches = config.job.verify_steps * train.accumulation * config.topology.trainers
    sequences = batches * train.batch_size
    examples = []
    # On average a chat has half of the longest length.
    for _ in range(2 * sequences * config.data.longest_row // longest):
        length = int(torch.randint(_SHORTEST, longest + 1, (), generator=draw))
        supervised = torch.rand(length, generator=draw) < _SUPERVISED_SHARE
        examples.append(Example(torch.randint(0, vocab_size, (length,), generator=draw), supervised))
    return ChatDataset(examples, max_length=longest)


def _random_mapping(vocab_size: int, draft_vocab_size: int, seed: int) -> VocabMapping:
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:draft_vocab_size]
    return VocabMapping.from_token_ids(ids, vocab_size)
