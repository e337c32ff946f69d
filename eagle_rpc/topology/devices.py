"""Devices of workers and the CUDA device maps between them, as pure data."""

from dataclasses import dataclass

from eagle_rpc.process.environment import World
from eagle_rpc.topology.roles import Cast, Role


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Where this worker computes and how its CUDA tensors reach each peer."""

    device: str  # "cpu" or "cuda:N"
    device_maps: dict[str, dict[str, str]]  # peer name -> {own device: peer device}


def plan_devices(cast: Cast, world: World, *, target: str, trainer: str, num_gpus: int) -> DevicePlan:
    """This worker's device, and its GPU mapped to those of its peers.

    `target` and `trainer` are `target.device` and `train.device`; a worker that is both follows the latter. The workers of one agent are
    on one host, where worker i of `cast.names` has local rank i; with settings of `auto` several share a GPU if there are fewer. Of
    peers with other agents neither host nor GPU is known, so nothing is mapped and CUDA tensors go through host memory.
    """

    def device_of(name: str, local_rank: int) -> str:
        setting = trainer if name in cast.trainer_names else target
        return resolve_device(setting, local_rank=local_rank, num_gpus=num_gpus)

    device = device_of(cast.me.name, world.local_rank)
    if world.num_agents > 1:
        return DevicePlan(device, {})
    peers = cast.target_names if cast.me.has(Role.trainer) else cast.trainer_names
    devices = {name: device_of(name, cast.names.index(name)) for name in peers}
    maps = {name: {device: there} for name, there in devices.items() if _are_gpus(device, there)}
    return DevicePlan(device, maps)


def _are_gpus(*devices: str) -> bool:
    return all(device.startswith("cuda") for device in devices)


def resolve_device(setting: str, *, local_rank: int, num_gpus: int) -> str:
    """`auto` is the local rank's GPU where there is one; with fewer GPUs than workers they share."""
    if setting == "auto":
        return f"cuda:{local_rank % num_gpus}" if num_gpus else "cpu"
    return "cuda:0" if setting == "cuda" else setting
