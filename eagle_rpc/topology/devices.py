"""Devices of workers and the CUDA device maps between them, as pure data."""

from dataclasses import dataclass

from eagle_rpc.topology.roles import Cast, Role


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Where this worker computes and how its CUDA tensors reach each peer."""

    device: str  # "cpu" or "cuda:N"
    device_maps: dict[str, dict[str, str]]  # peer name -> {own device: peer device}


def plan_devices(cast: Cast, *, setting: str, local_rank: int, num_gpus: int) -> DevicePlan:
    """Resolves `auto` and maps this worker's GPU to the peers' on the same host.

    Worker i of `cast.names` is taken to have local rank i, so with fewer GPUs than workers several share one.
    """
    device = resolve_device(setting, local_rank=local_rank, num_gpus=num_gpus)
    if not device.startswith("cuda"):
        return DevicePlan(device, {})
    peers = cast.target_names if cast.me.has(Role.trainer) else cast.trainer_names
    maps = {name: {device: f"cuda:{cast.names.index(name) % num_gpus}"} for name in peers}
    return DevicePlan(device, maps)


def resolve_device(setting: str, *, local_rank: int, num_gpus: int) -> str:
    """`auto` is the local rank's GPU where there is one; with fewer GPUs than workers they share."""
    if setting == "auto":
        return f"cuda:{local_rank % num_gpus}" if num_gpus else "cpu"
    return "cuda:0" if setting == "cuda" else setting
