"""Devices of workers and the CUDA device maps between them, as pure data."""

import ctypes
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from eagle_rpc.errors import ConfigError
from eagle_rpc.process.environment import World
from eagle_rpc.topology.roles import Cast, Role

_NVIDIA_DRIVER = "libcuda.so.1"
_AMD_DEVICE = Path("/dev/kfd")


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The devices of this worker, and how its CUDA tensors reach each peer."""

    devices: tuple[
        str, ...
    ]  # "cpu" or "cuda:N"; several for a target over several GPUs, in the order of its layers
    device_maps: dict[str, dict[str, str]]  # peer name -> {own device: peer device}

    @property
    def device(self) -> str:
        """The device of its supervision: of a target over several GPUs the last one."""
        return self.devices[-1]


def plan_devices(
    cast: Cast,
    world: World,
    *,
    target: str,
    trainer: str,
    devices_per_target: int = 1,
    num_gpus: int | None = None,
) -> DevicePlan:
    """The devices of this worker, mapped to the GPUs of its peers.

    `target` and `trainer` are the settings `target.device` and `train.device`; a worker with both roles
    follows `train.device`. `num_gpus` None: as many as torch finds. The workers of one torchrun agent share a
    host, where worker i of `cast.names` has local rank i. Host and GPUs of other agents' workers are unknown:
    nothing is mapped to them, and CUDA tensors go through host memory, as they do where RPC `carries` none.
    Raises `ConfigError` for a GPU that the host lacks, and if targets over several GPUs and trainers need more.
    """
    if num_gpus is None:
        num_gpus = count_gpus()

    def devices_of(name: str, local_rank: int) -> tuple[str, ...]:
        if name not in cast.trainer_names:
            return resolve_devices(target, devices_per_target, local_rank=local_rank, num_gpus=num_gpus)
        # Targets are the first workers of a host: their further devices come before those of trainers.
        on_host = cast.names[:local_rank] if world.num_agents == 1 else ()
        before = sum(one not in cast.trainer_names for one in on_host)
        place = local_rank + before * (devices_per_target - 1)
        return (resolve_device(trainer, field="train.device", local_rank=place, num_gpus=num_gpus),)

    own = devices_of(cast.me.name, world.local_rank)
    if world.num_agents > 1:
        return DevicePlan(own, {})
    if devices_per_target > 1 and num_gpus and target == trainer == "auto":
        stages = cast.stages_per_target
        needed = devices_per_target * stages * len(cast.target_names) + len(cast.trainer_names)
        if needed > num_gpus:
            rule = f"topology.devices_per_target={devices_per_target} needs {needed} GPUs"
            of_stages = f" of {stages} stages" if stages > 1 else ""
            workers = f"{len(cast.target_names)} targets{of_stages} and {len(cast.trainer_names)} trainers"
            raise ConfigError(f"{rule} for {workers} unless train.device names one, got {num_gpus}")
    peers = cast.target_names if cast.me.has(Role.trainer) else cast.trainer_names
    if cast.me.has(Role.stage):
        # Between stages tensors go through host memory.
        peers = ()
    devices = {name: devices_of(name, index) for index, name in enumerate(cast.names)}
    maps = {
        peer: {own[-1]: devices[peer][-1]}
        for peer in peers
        if carries(own[-1], devices[peer][-1], devices.values())
    }
    return DevicePlan(own, maps)


def resolve_devices(
    setting: str, devices_per_target: int, *, local_rank: int = 0, num_gpus: int | None = None
) -> tuple[str, ...]:
    """The devices of a target: for `auto` those behind the targets before it on its host.

    `cuda:K` names the first of them. Raises `ConfigError` for more GPUs than the host has.
    """
    if num_gpus is None and setting != "cpu":
        num_gpus = count_gpus()
    if devices_per_target == 1 or setting == "cpu" or not num_gpus:
        return (resolve_device(setting, local_rank=local_rank, num_gpus=num_gpus),) * devices_per_target
    first = local_rank * devices_per_target
    if setting != "auto":
        first = int(setting.partition(":")[2] or 0)
    if first + devices_per_target > num_gpus:
        rule = f"topology.devices_per_target={devices_per_target} needs GPUs {first}"
        last = first + devices_per_target - 1
        raise ConfigError(f"{rule} to {last} of this host for target {local_rank}, which has {num_gpus}")
    return tuple(f"cuda:{first + number}" for number in range(devices_per_target))


def carries(one: str, other: str, workers: Collection[Collection[str]]) -> bool:
    """Whether RPC is to carry tensors from GPU `one` to GPU `other`, each of another worker.

    `workers` are the devices of each worker. Each of the two GPUs must be that of one worker alone. Where others
    compute on it too, tensors arrive late or wrong (seen on H100 and H200; pytorch/pytorch#100784).
    """
    if not (one and other) or "cpu" in (one, other) or one == other:
        return False
    return all(sum(gpu in devices for devices in workers) == 1 for gpu in (one, other))


def resolve_device(
    setting: str, *, field: str = "target.device", local_rank: int = 0, num_gpus: int | None = None
) -> str:
    """The device of a setting. `auto` is the GPU of the local rank, shared if there are too few, or the CPU.

    `num_gpus` None: as many as torch finds. Raises `ConfigError` naming `field` for a GPU beyond them.
    """
    if setting == "cpu":
        return setting
    if num_gpus is None:
        num_gpus = count_gpus()
    if setting == "auto":
        return f"cuda:{local_rank % num_gpus}" if num_gpus else "cpu"
    number = int(setting.partition(":")[2] or 0)
    if number >= num_gpus:
        raise ConfigError(f"{field} must be a device of this host, which has {num_gpus} GPUs, got {setting}")
    return f"cuda:{number}"


def count_gpus() -> int:
    """The GPUs that torch finds. It is not loaded on a host without a driver for any."""
    if not _has_driver():
        return 0
    # Roles and names are needed where torch is not loaded.
    import torch

    return torch.cuda.device_count()


def _has_driver() -> bool:
    """Whether this host has what torch needs to find a GPU: NVIDIA's library, or AMD's device."""
    try:
        ctypes.CDLL(_NVIDIA_DRIVER)
    except OSError:
        return _AMD_DEVICE.exists()
    return True
