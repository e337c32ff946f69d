"""Prints the workers, traffic and memory of a configuration, without starting a worker."""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from eagle_rpc.config import Config
from eagle_rpc.draft import Eagle3DraftConfig
from eagle_rpc.jobs.assembly import draft_config
from eagle_rpc.process import read_world
from eagle_rpc.serving.export import EMBEDDING, weight_shapes
from eagle_rpc.supervision import ENCODINGS, TargetShape
from eagle_rpc.target.capture import aux_layers
from eagle_rpc.target.loading import load_target_config
from eagle_rpc.target.stored import auto_class
from eagle_rpc.topology import Role, assign_roles, plan_devices

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GIB = 2**30
# Of a trained parameter: fp32 weight, gradient and AdamW's two moments; Muon keeps one of them less.
_TRAINED_BYTES = 4 * 4


def run(config: Config) -> int:
    """Prints the plan; always 0."""
    target = load_target_config(config.target, cache_dir=config.run.cache_dir)
    for label, value in _lines(config, target, TargetShape.of(target)):
        sys.stdout.write(f"{label:<28}{value}\n")
    return 0


def _lines(config: Config, target: PretrainedConfig, shape: TargetShape) -> Iterator[tuple[str, str]]:
    draft = draft_config(config, shape)
    yield "run directory", config.run.dir
    for name, role, device in _workers(config):
        yield name, f"{role} on {device}"
    sizes = f"{shape.num_layers} layers, hidden {shape.hidden_size}"
    yield "target", f"{config.target.model}, {shape.model_type}, {sizes}"
    yield "captured layers", str(aux_layers(shape.num_layers, config.target.aux_layer_ids))
    vocabulary = f"vocabulary {draft.draft_vocab_size} of {draft.vocab_size}"
    yield "draft", f"{_count(draft) / 1e6:.1f} M trained parameters, {vocabulary}"
    heads = f"{draft.num_attention_heads} heads and {draft.num_key_value_heads} key heads of {draft.head_dim}"
    rope = (draft.rope_scaling or {"rope_type": "plain"})["rope_type"]
    yield "draft, shape", f"{heads}, feed-forward {draft.intermediate_size}, {rope} rotary embedding"
    encoding, prefetch = config.supervision.encoding.value, config.supervision.prefetch
    yield "encoding", f"{encoding}, {prefetch} requests in flight a trainer"
    yield from _traffic(config, draft)
    yield from _memory(config, target, draft)


def _workers(config: Config) -> Iterator[tuple[str, str, str]]:
    """Name, roles and device of each worker if all run on this host."""
    size = 1 if config.topology.single else config.topology.targets + config.topology.trainers
    target, trainer = config.target.device, config.train.device
    for rank in range(size):
        world = replace(read_world({}), rank=rank, size=size, local_rank=rank, local_size=size)
        cast = assign_roles(config.topology, world)
        num_gpus = torch.cuda.device_count()
        devices = plan_devices(cast, world, target=target, trainer=trainer, num_gpus=num_gpus)
        yield cast.me.name, " and ".join(role.value for role in Role if cast.me.has(role)), devices.device


def _traffic(config: Config, draft: Eagle3DraftConfig) -> Iterator[tuple[str, str]]:
    for encoding in ENCODINGS:
        size = _bytes_per_token(config, draft, encoding)
        rate = f"{size * 1e3 / 1e9:.4f} GB/s for each 1,000 tokens/s"
        yield f"wire, {encoding}", f"{size:,.0f} bytes a supervised token, {rate}"


def _bytes_per_token(config: Config, draft: Eagle3DraftConfig, encoding: str) -> float:
    return ENCODINGS[encoding].bytes_per_token(
        hidden_size=draft.hidden_size,
        draft_vocab_size=draft.draft_vocab_size,
        dtype_bytes=_DTYPE_BYTES[config.target.dtype.value],
        num_aux_layers=draft.num_aux_layers,
    )


def _memory(config: Config, target: PretrainedConfig, draft: Eagle3DraftConfig) -> Iterator[tuple[str, str]]:
    dtype_bytes = _DTYPE_BYTES[config.target.dtype.value]
    with torch.device("meta"):
        num_parameters = auto_class(target).from_config(target).num_parameters()
    weights = f"{num_parameters * dtype_bytes / _GIB:.2f} GiB"
    yield "target, weights", f"{weights} ({num_parameters / 1e6:.1f} M parameters)"
    # Without the fused kernel a GPU copies logits to fp32; a CPU copies few rows at a time.
    copied = torch.cuda.is_available() and not config.target.fused_rows
    chunk = config.target.chunk_rows * draft.vocab_size * (dtype_bytes + 4 * copied)
    yield "target, projection", f"{chunk / _GIB:.2f} GiB for {config.target.chunk_rows} rows of logits"
    state = _count(draft) * _TRAINED_BYTES + draft.vocab_size * draft.hidden_size * dtype_bytes
    yield "trainer, weights and optimiser", f"{state / _GIB:.2f} GiB"
    tokens = config.train.batch_size * config.data.longest_row
    reply = tokens * _bytes_per_token(config, draft, config.supervision.encoding.value)
    in_flight = config.supervision.prefetch + config.train.accumulation
    yield "trainer, replies", f"{in_flight * reply / _GIB:.2f} GiB at most: {in_flight} of {tokens} tokens"


def _count(draft: Eagle3DraftConfig) -> int:
    """Number of trained parameters."""
    return sum(math.prod(shape) for name, shape in weight_shapes(draft).items() if name != EMBEDDING)
