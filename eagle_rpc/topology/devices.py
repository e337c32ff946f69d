"""Devices of workers and the CUDA device maps between them, as pure data."""

from collections.abc import Collection
from dataclasses import dataclass

from eagle_rpc.errors import ConfigError
from eagle_rpc.process.environment import World
from eagle_rpc.topology.roles import Cast, Role


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The device of this worker, and how its CUDA tensors reach each peer."""

    device: str  # "cpu" or "cuda:N"
    device_maps: dict[str, dict[str, str]]  # peer name -> {own device: peer device}


def plan_devices(
    cast: Cast, world: World, *, target: str, trainer: str, num_gpus: int | None = None
) -> DevicePlan:
    """The device of this worker, mapped to the GPUs of its peers.

    `target` and `trainer` are the settings `target.device` and `train.device`; a worker with both roles
    follows `train.device`. `num_gpus` None: as many as torch finds. The workers of one torchrun agent share a
    host, where worker i of `cast.names` has local rank i. Host and GPUs of other agents' workers are unknown:
    nothing is mapped to them, and CUDA tensors go through host memory, as they do where RPC `carries` none.
    """

    def device_of(name: str, local_rank: int) -> str:
        trains = name in cast.trainer_names
        return resolve_device(
            trainer if trains else target,
            field="train.device" if trains else "target.device",
            local_rank=local_rank,
            num_gpus=num_gpus,
        )

    device = device_of(cast.me.name, world.local_rank)
    if world.num_agents > 1:
        return DevicePlan(device, {})
    peers = cast.target_names if cast.me.has(Role.trainer) else cast.trainer_names
    devices = [device_of(name, index) for index, name in enumerate(cast.names)]
    gpus = [one if one.startswith("cuda") else "" for one in devices]
    gpu_of = dict(zip(cast.names, gpus, strict=True))
    mine, num_trainers = gpu_of[cast.me.name], len(cast.trainer_names)
    connected = [peer for peer in peers if carries(mine, gpu_of[peer], gpus, num_trainers=num_trainers)]
    maps = {peer: {mine: gpu_of[peer]} for peer in connected}
    return DevicePlan(device, maps)


def carries(one: str, other: str, gpus: Collection[str], *, num_trainers: int) -> bool:
    """Whether RPC is to carry tensors from GPU to GPU between two workers.

    `gpus` are those of all workers, "" for a worker without one. While a trainer waits for others in a
    collective, tensors arrive late or wrong if a third process computes on a GPU of the two (seen on two
    H200; pytorch/pytorch#100784).
    """
    if not (one and other):
        return False
    workers = sum(gpu in (one, other) for gpu in gpus)
    return workers == len({one, other}) or (workers == 2 and num_trainers == 1)


def resolve_device(
    setting: str, *, field: str = "target.device", local_rank: int = 0, num_gpus: int | None = None
) -> str:
    """The device of a setting. `auto` is the GPU of the local rank, shared if there are too few, or the CPU.

    `num_gpus` None: as many as torch finds. Raises `ConfigError` naming `field` for a GPU beyond them.
    """
    if setting == "cpu":
        return setting
    if num_gpus is None:
        # Roles and names are needed where torch is not loaded.
        import torch

        num_gpus = torch.cuda.device_count()
    if setting == "auto":
        return f"cuda:{local_rank % num_gpus}" if num_gpus else "cpu"
    number = int(setting.partition(":")[2] or 0)
    if number >= num_gpus:
        raise ConfigError(f"{field} must be a device of this host, which has {num_gpus} GPUs, got {setting}")
    return f"cuda:{number}"
