"""Prints the workers, traffic and memory of a configuration, without starting a worker."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from eagle_rpc.config import Config
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.jobs.draft_form import planned_draft
from eagle_rpc.jobs.target_sizes import target_sizes
from eagle_rpc.process import read_world
from eagle_rpc.sizes.draft import Eagle3DraftConfig
from eagle_rpc.sizes.memory import DeviceMemory, Load, memory_by_device
from eagle_rpc.sizes.outline import Division, TargetSizes, WeightFormat
from eagle_rpc.sizes.target import aux_layers
from eagle_rpc.sizes.wire import WIRE_SIZES
from eagle_rpc.topology import Role, assign_roles, count_gpus, plan_devices

_GIB = 2**30
# Devices of one host that a target is planned for.
_MOST_DEVICES = 16
# Of a trained parameter: fp32 weight, gradient and AdamW's two moments; Muon keeps one of them less.
_TRAINED_BYTES = 4 * 4


def run(config: Config) -> int:
    """Prints the plan; always 0."""
    for label, value in _lines(config, target_sizes(config)):
        sys.stdout.write(f"{label:<32}{value}\n")
    return 0


def _lines(config: Config, target: TargetSizes) -> Iterator[tuple[str, str]]:
    shape = target.shape
    draft = planned_draft(config, shape)
    yield "run directory", config.run.dir
    for name, role, device in _workers(config):
        yield name, f"{role} on {device}"
    sizes = f"{shape.num_layers} layers, hidden {shape.hidden_size}"
    yield "target", f"{config.target.model}, {shape.model_type}, {sizes}"
    yield "captured layers", str(aux_layers(shape.num_layers, config.target.aux_layer_ids))
    vocabulary = f"vocabulary {draft.draft_vocab_size} of {draft.vocab_size}"
    yield "draft", f"{num_trained(config, draft) / 1e6:.1f} M trained parameters, {vocabulary}"
    heads = f"{draft.num_attention_heads} heads and {draft.num_key_value_heads} key heads of {draft.head_dim}"
    rope = (draft.rope_scaling or {"rope_type": "plain"})["rope_type"]
    yield "draft, shape", f"{heads}, feed-forward {draft.intermediate_size}, {rope} rotary embedding"
    yield "draft, form", _form_of(draft)
    encoding, prefetch = config.supervision.encoding.value, config.supervision.prefetch
    yield "encoding", f"{encoding}, {prefetch} requests in flight a trainer"
    yield from _traffic(config, draft)
    yield from _memory(config, target, draft)


def _form_of(draft: Eagle3DraftConfig) -> str:
    norms = [
        name
        for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        if getattr(draft, name)
    ]
    window = "" if draft.sliding_window is None else f", a window of {draft.sliding_window} tokens"
    return f"{draft.num_layers} layer{'s' * (draft.num_layers > 1)}{window}, {', '.join(norms) or 'no further norms'}"


def _workers(config: Config) -> Iterator[tuple[str, str, str]]:
    """Name, roles and devices of each worker if all run on this host."""
    topology, num_gpus = config.topology, count_gpus()
    size = 1 if topology.single else topology.targets * topology.stages_per_target + topology.trainers
    target, trainer = config.target.device, config.train.device
    for rank in range(size):
        world = replace(read_world({}), rank=rank, size=size, local_rank=rank, local_size=size)
        cast = assign_roles(config.topology, world)
        devices = plan_devices(
            cast,
            world,
            target=target,
            trainer=trainer,
            devices_per_target=config.topology.devices_per_target,
            num_gpus=num_gpus,
        )
        roles = " and ".join(role.value for role in Role if cast.me.has(role))
        yield cast.me.name, roles, ", ".join(devices.devices)


def _traffic(config: Config, draft: Eagle3DraftConfig) -> Iterator[tuple[str, str]]:
    for encoding in WIRE_SIZES:
        size = bytes_per_token(config, draft, encoding)
        rate = f"{size * 1e3 / 1e9:.4f} GB/s for each 1,000 tokens/s"
        yield f"wire, {encoding}", f"{size:,.0f} bytes a supervised token, {rate}"


def bytes_per_token(config: Config, draft: Eagle3DraftConfig, encoding: str) -> float:
    """Bytes of a supervised token on the wire."""
    return WIRE_SIZES[encoding].bytes_per_token(
        hidden_size=draft.hidden_size,
        draft_vocab_size=draft.draft_vocab_size,
        dtype_bytes=config.target.dtype.num_bytes,
        num_aux_layers=draft.num_aux_layers,
    )


def _memory(config: Config, target: TargetSizes, draft: Eagle3DraftConfig) -> Iterator[tuple[str, str]]:
    dtype_bytes = config.target.dtype.num_bytes
    yield from _target_memory(config, target, draft)
    state = num_trained(config, draft) * _TRAINED_BYTES
    if not config.draft.train_embeddings:
        state += draft.vocab_size * draft.hidden_size * dtype_bytes
    yield "trainer, weights and optimiser", f"{state / _GIB:.2f} GiB"
    tokens, in_flight = _request(config), config.supervision.prefetch + config.train.accumulation
    reply = tokens * bytes_per_token(config, draft, config.supervision.encoding.value)
    yield "trainer, replies", f"{in_flight * reply / _GIB:.2f} GiB at most: {in_flight} of {tokens} tokens"


def _target_memory(
    config: Config, target: TargetSizes, draft: Eagle3DraftConfig
) -> Iterator[tuple[str, str]]:
    """What each device of a target holds, and the fewest devices that are enough. By formula: nothing is run."""
    shape, outline = target.shape, target.outline
    weights = WeightFormat.of(config.target, target.quantization, shape.experts_per_token)
    load, stages = _load(config, target, draft), config.topology.stages_per_target

    def on_devices(number: int) -> tuple[Division, list[DeviceMemory]]:
        """`number`: of each stage."""
        division = outline.divided(number * stages, weights)
        return division, memory_by_device(division, shape, load, stages)

    division, devices = on_devices(config.topology.devices_per_target)
    num_bytes, parameters = sum(one.weights for one in devices), outline.num_parameters
    yield "target, weights", f"{num_bytes / _GIB:.2f} GiB ({parameters / 1e6:.1f} M parameters)"
    yield "target, largest request", f"{config.train.batch_size} x {config.data.longest_row} tokens"
    if len(devices) > 1:
        yield "target, passes under way", _pipeline(config)
    room = config.job.plan_device_gib
    for number, needed in enumerate(devices):
        own = division.layers_of(number)
        total = f"{needed.total / _GIB:.2f} GiB"
        if room is not None:
            total += f", {'fits' if needed.total <= room * _GIB else 'does not fit'} {room:g} GiB"
        yield _place(config, number), f"{total}: layers {own[0]} to {own[-1]}, {_parts(needed)}"
    if room is not None:
        yield "target, fewest devices", _fewest(on_devices, shape.num_layers // stages, room)


def _place(config: Config, number: int) -> str:
    """The device with this number among those of all stages."""
    stage, device = divmod(number, config.topology.devices_per_target)
    of_stage = f"stage {stage}, " if config.topology.stages_per_target > 1 else ""
    return f"target, {of_stage}device {device}"


def _pipeline(config: Config) -> str:
    """Whether trainers send enough requests for every device of a target to have one."""
    topology, prefetch = config.topology, config.supervision.prefetch
    most = topology.stages_per_target * topology.devices_per_target + 1
    sent = prefetch * topology.trainers // topology.targets
    told = f"{most} at most, trainers keep {sent} requests in flight at a target"
    return told if sent >= most else f"{told}: too few to keep all devices busy (supervision.prefetch)"


def _fewest(
    on_devices: Callable[[int], tuple[Division, list[DeviceMemory]]], num_layers: int, room: float
) -> str:
    try:
        for number in range(1, min(num_layers, _MOST_DEVICES) + 1):
            if max(one.total for one in on_devices(number)[1]) <= room * _GIB:
                return f"topology.devices_per_target={number} fits {room:g} GiB a device"
    except UnsupportedTarget as error:
        return str(error)
    return f"more than {min(num_layers, _MOST_DEVICES)}: requests have to be smaller, or weights quantised"


def _parts(needed: DeviceMemory) -> str:
    return ", ".join(
        f"{label} {size / _GIB:.2f}"
        for label, size in (
            ("weights", needed.weights),
            ("activations", needed.activations),
            ("passes under way", needed.under_way),
            ("logits", needed.head),
            ("replies", needed.replies),
        )
        if size
    )


def _load(config: Config, target: TargetSizes, draft: Eagle3DraftConfig) -> Load:
    """Each trainer's requests in flight wait as replies at one target, up to its own bound."""
    attention = config.target.attention
    reply = _request(config) * bytes_per_token(config, draft, config.supervision.encoding.value)
    replies = config.topology.trainers * config.supervision.prefetch * reply
    return Load(
        batch=config.train.batch_size,
        length=config.data.longest_row,
        dtype_bytes=config.target.dtype.num_bytes,
        chunk_rows=config.target.chunk_rows,
        # Without the fused kernel a GPU copies logits to fp32; a CPU copies few rows at a time.
        copies_logits=count_gpus() > 0 and not config.target.fused_rows,
        eager=attention == "eager" or (attention == "sdpa" and not target.sdpa),
        reply_bytes=min(replies, config.target.max_reply_bytes),
    )


def _request(config: Config) -> int:
    """Tokens of the largest request that these settings send."""
    return config.train.batch_size * config.data.longest_row


def num_trained(config: Config, draft: Eagle3DraftConfig) -> int:
    """Number of trained parameters."""
    return draft.num_parameters(embedding=config.draft.train_embeddings)
