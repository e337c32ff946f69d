"""Prints what a configuration would start and cost, without starting anything."""

import sys
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from eagle_rpc.config import Config
from eagle_rpc.draft import Eagle3DraftConfig
from eagle_rpc.jobs.trainer_worker import draft_config
from eagle_rpc.serving.export import weight_shapes
from eagle_rpc.supervision import ENCODINGS
from eagle_rpc.target.capture import aux_layers
from eagle_rpc.target.loading import load_target_config
from eagle_rpc.topology import resolve_device

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GIB = 2**30
# AdamW keeps two moments beside each fp32 weight and its gradient.
_TRAINED_BYTES = 4 * 4


def run(config: Config) -> int:
    """Prints the plan; always 0."""
    target = load_target_config(config.target, cache_dir=config.run.cache_dir)
    for label, value in _lines(config, target):
        sys.stdout.write(f"{label:<28}{value}\n")
    return 0


def _lines(config: Config, target: PretrainedConfig) -> Iterator[tuple[str, str]]:
    draft = draft_config(config, target)
    yield "run directory", config.run.dir
    for name, role, device in _workers(config):
        yield name, f"{role} on {device}"
    yield (
        "target",
        f"{config.target.model}, {target.model_type}, {target.num_hidden_layers} layers, hidden {target.hidden_size}",
    )
    yield "captured layers", str(aux_layers(target.num_hidden_layers, config.target.aux_layer_ids))
    yield (
        "draft",
        f"{_count(draft) / 1e6:.1f} M trained parameters, vocabulary {draft.draft_vocab_size} of {draft.vocab_size}",
    )
    yield (
        "encoding",
        f"{config.supervision.encoding.value}, {config.supervision.prefetch} requests in flight a trainer",
    )
    yield from _traffic(config, draft)
    yield from _memory(config, target, draft)


def _workers(config: Config) -> Iterator[tuple[str, str, str]]:
    """Name, role and device of each worker, as on one host with this one's GPUs."""
    topology, num_gpus = config.topology, torch.cuda.device_count()
    if topology.single:
        yield (
            "single0",
            "target and trainer",
            resolve_device(config.train.device, local_rank=0, num_gpus=num_gpus),
        )
        return
    targets = [(f"target{index}", "target", config.target.device) for index in range(topology.targets)]
    trainers = [(f"trainer{index}", "trainer", config.train.device) for index in range(topology.trainers)]
    for local_rank, (name, role, setting) in enumerate(targets + trainers):
        yield name, role, resolve_device(setting, local_rank=local_rank, num_gpus=num_gpus)


def _traffic(config: Config, draft: Eagle3DraftConfig) -> Iterator[tuple[str, str]]:
    dtype_bytes = _DTYPE_BYTES[config.target.dtype.value]
    for name, encoding in ENCODINGS.items():
        size = encoding.bytes_per_token(
            hidden_size=draft.hidden_size,
            draft_vocab_size=draft.draft_vocab_size,
            dtype_bytes=dtype_bytes,
        )
        yield (
            f"wire, {name}",
            f"{size:,.0f} bytes a supervised token, {size * 1e3 / 1e9:.4f} GB/s for each 1,000 tokens/s",
        )


def _memory(config: Config, target: PretrainedConfig, draft: Eagle3DraftConfig) -> Iterator[tuple[str, str]]:
    dtype_bytes = _DTYPE_BYTES[config.target.dtype.value]
    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(target).num_parameters()
    yield (
        "target, weights",
        f"{num_parameters * dtype_bytes / _GIB:.2f} GiB ({num_parameters / 1e6:.1f} M parameters)",
    )
    # A GPU without the fused kernel reads logits through an fp32 copy; a CPU copies few rows at a time.
    copied = torch.cuda.is_available() and not config.target.fused_rows
    chunk = config.target.chunk_rows * target.vocab_size * (dtype_bytes + 4 * copied)
    yield "target, projection", f"{chunk / _GIB:.2f} GiB for {config.target.chunk_rows} rows of logits"
    state = _count(draft) * _TRAINED_BYTES + draft.vocab_size * draft.hidden_size * dtype_bytes
    yield "trainer, weights and AdamW", f"{state / _GIB:.2f} GiB"
    tokens = config.train.batch_size * config.data.longest_row
    reply = tokens * ENCODINGS[config.supervision.encoding.value].bytes_per_token(
        hidden_size=draft.hidden_size,
        draft_vocab_size=draft.draft_vocab_size,
        dtype_bytes=dtype_bytes,
    )
    in_flight = config.supervision.prefetch + config.train.accumulation
    yield "trainer, replies", f"{in_flight * reply / _GIB:.2f} GiB at most: {in_flight} of {tokens} tokens"


def _count(draft: Eagle3DraftConfig) -> int:
    """Trained parameters."""
    sizes = 0
    for name, shape in weight_shapes(draft).items():
        if name != "embed_tokens.weight":
            size = 1
            for dimension in shape:
                size *= dimension
            sizes += size
    return sizes
