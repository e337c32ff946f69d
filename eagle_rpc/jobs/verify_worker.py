"""A worker of one side of `job=verify`: trains a few steps on synthetic chats and records the bits it saw."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from eagle_rpc.config import Config
from eagle_rpc.config.choices import Encoding, VerifySide
from eagle_rpc.data import ChatDataset, Example
from eagle_rpc.jobs.permissions import static_permissions
from eagle_rpc.jobs.train import DONE, READY, serve_until_done
from eagle_rpc.jobs.trainer_worker import connect_target, join_group, make_draft, make_record, plan_batches
from eagle_rpc.process import bind_to_interface, read_world, stop_signals
from eagle_rpc.process.startup import start_worker
from eagle_rpc.rpc import attempt_store, join_static
from eagle_rpc.supervision import (
    Eagle3TargetBackend,
    Eagle3TargetBatch,
    SessionSettings,
    TokenBatch,
    VocabMapping,
)
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.loading import load_target_config
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.topology import Cast, Role, Worker, assign_roles, plan_devices, resolve_device
from eagle_rpc.train import RunDirectory, Trainer, TrainerGroup

_SHORTEST = 8  # tokens of a synthetic chat
_SUPERVISED_SHARE = 0.7
# Both sides sum over gloo: over NCCL, which co-located trainers on one GPU cannot use, sums may have other bits.
_GROUP_DEVICE = torch.device("cpu")


def record_steps(config: Config) -> int:
    """Plays this process's role on its side; returns 0."""
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
    device = torch.device(resolve_device(config.train.device, local_rank=world.local_rank))
    store = attempt_store(world, timeout=config.rpc.start_timeout)
    target = HFEagle3TargetModel.load(
        config.target, device, cache_dir=config.run.cache_dir, seed=config.run.seed
    )
    target_config = load_target_config(config.target, cache_dir=config.run.cache_dir)
    with join_group(config, cast, store, _GROUP_DEVICE) as group:
        for encoding in config.job.verify_encodings:
            backend = ColocatedEagle3TargetModel(
                target,
                config.target,
                SessionSettings(encoding=encoding.name, rows=config.supervision.rows.value),
            )
            _train_and_record(config, encoding, target_config, backend, group, device, stop)
        # Whoever hosts the store leaves last.
        group.barrier("the other trainers to finish")


def _record_remote(config: Config, stop: threading.Event) -> None:
    world = read_world()
    cast = assign_roles(config.topology, world)
    start_worker(config, cast.me.name, workers_on_host=world.local_size)
    # As the co-located ones, targets run where trainers do.
    devices = plan_devices(cast, world, target=config.train.device, trainer=config.train.device)
    device = torch.device(devices.device)
    with join_static(cast, world, config.rpc, devices, static_permissions(config.rpc)) as membership:
        if cast.me.has(Role.target):
            serve_until_done(config, device, membership, stop)
            return
        membership.wait_for(cast.target_names, READY, timeout=config.rpc.model_timeout)
        target_config = load_target_config(config.target, cache_dir=config.run.cache_dir)
        with join_group(config, cast, membership.store, _GROUP_DEVICE) as group:
            for encoding in config.job.verify_encodings:
                of_encoding = replace(config, supervision=replace(config.supervision, encoding=encoding))
                backend = connect_target(of_encoding, target_config, None, device, cast, membership, stop)
                _train_and_record(of_encoding, encoding, target_config, backend, group, device, stop)
        membership.mark(DONE)


def _train_and_record(
    config: Config,
    encoding: Encoding,
    target_config: PretrainedConfig,
    backend: Eagle3TargetBackend,
    group: TrainerGroup,
    device: torch.device,
    stop: threading.Event,
) -> None:
    chats = synthetic_chats(config, target_config.vocab_size)
    mapping = _random_mapping(target_config.vocab_size, config.draft.vocab_size, config.run.seed)
    path = record_path(RunDirectory.of(config).path, encoding.name, group.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    run = RunDirectory(path.parent)
    with contextlib.closing(RecordingBackend(backend)) as recording:
        recording.open_session(mapping)
        trainer = Trainer(
            config.train,
            config.draft,
            draft=make_draft(config, target_config, recording, device),
            backend=recording,
            batches=plan_batches(config, chats, rank=group.rank, num_ranks=group.size),
            validation=None,
            group=group,
            run=run,
            record=make_record(config, target_config, recording, mapping),
            stop=stop,
        )
        trainer.train()
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()] if group.is_primary else []
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
    """Chats of random tokens and lengths, a function of the seed, for about as many rows as are compared, packed or not."""
    draw = torch.Generator().manual_seed(config.run.seed)
    longest = config.data.max_length
    rows = (
        config.job.verify_steps
        * config.train.accumulation
        * config.train.batch_size
        * config.topology.trainers
    )
    examples = []
    # Chats have half of the longest length on average.
    for _ in range(2 * rows * config.data.longest_row // longest):
        length = int(torch.randint(_SHORTEST, longest + 1, (), generator=draw))
        supervised = torch.rand(length, generator=draw) < _SUPERVISED_SHARE
        examples.append(Example(torch.randint(0, vocab_size, (length,), generator=draw), supervised))
    return ChatDataset(examples, max_length=longest)


def _random_mapping(vocab_size: int, draft_vocab_size: int, seed: int) -> VocabMapping:
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:draft_vocab_size]
    return VocabMapping.from_token_ids(ids, vocab_size)


class RecordingBackend:
    """Passes everything on and keeps a digest of every supervision tensor that passes."""

    def __init__(self, backend: Eagle3TargetBackend) -> None:
        self._backend = backend
        self.digests: list[dict[str, str]] = []  # one dict a batch
        self.rows: list[int] = []  # supervised rows of each batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def stream(self, batches: Iterable[TokenBatch]) -> Iterator[Eagle3TargetBatch]:
        for batch in self._backend.stream(batches):
            self.digests.append({name: _digest(tensor) for name, tensor in _tensors(batch).items()})
            self.rows.append(batch.supervised_rows.numel())
            yield batch


def _tensors(batch: Eagle3TargetBatch) -> dict[str, Tensor]:
    return {
        "input_ids": batch.input_ids,
        "loss_mask": batch.loss_mask,
        "aux_hidden_states": batch.aux_hidden_states,
        "supervised_rows": batch.supervised_rows,
        "target_probs": batch.target_probs,
        "position_mask": batch.position_mask,
        "log_normalizer": batch.log_normalizer,
        "argmax": batch.argmax,
    }


def _digest(tensor: Tensor) -> str:
    """Over every bit."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(
        f"{tuple(tensor.shape)} {tensor.dtype}".encode() + flat.view(torch.uint8).numpy().tobytes()
    ).hexdigest()
