"""The membership of a target or trainer in an elastic service, as the configuration describes it."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from eagle_rpc.config import Config
from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.config.texts import parse_address
from eagle_rpc.errors import ConfigError, WaitTimeout
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.jobs.stages import hand_over_bytes
from eagle_rpc.process import host_address, interface_address, is_loopback
from eagle_rpc.process.waiting import wait_until
from eagle_rpc.registry import RegistryClient, load_or_create_token, load_token
from eagle_rpc.rpc import ElasticMembership, join_elastic
from eagle_rpc.topology import Role


def announced(
    config: Config,
    name: str,
    role: Role,
    device: torch.device,
    stop: threading.Event,
    *,
    when_superseded: Callable[[], None],
) -> contextlib.AbstractContextManager[ElasticMembership]:
    """This worker's membership, announced at `rpc.registry` while the body runs.

    Raises the errors of `load_registry_token` and `join_elastic`, and `ConfigError` if other hosts could not
    reach this worker.
    """
    _require_reachable(config.rpc)
    return join_elastic(
        name,
        role.value,
        run=config.run.name if role is Role.trainer else "",
        device=str(device),
        config=config.rpc,
        permissions=permissions(
            config.rpc, role, hand_over_bytes=0 if role is Role.trainer else hand_over_bytes(config)
        ),
        registry=RegistryClient(config.rpc.registry, load_registry_token(config.rpc, stop)),
        stop=stop,
        when_superseded=when_superseded,
        # As SIGTERM.
        when_drained=stop.set,
    )


def _require_reachable(config: RpcConfig) -> None:
    """Workers of other hosts would look for one on loopback on their own hosts."""
    own = interface_address(config.interface)
    with contextlib.suppress(OSError):
        registry = host_address(parse_address(config.registry)[0])
        if is_loopback(own) and not is_loopback(registry):
            rule = (
                f"rpc.interface must be one that other hosts reach, since rpc.registry is {config.registry}"
            )
            raise ConfigError(f"{rule}, got {config.interface} with {own}")


def load_registry_token(config: RpcConfig, stop: threading.Event) -> bytes:
    """The token in `rpc.token_file`; waits for it up to `rpc.start_timeout` seconds, not beyond `stop`.

    Raises `WaitTimeout` if the file does not appear, `ConfigError` or `AccessRefused` if it is unusable.
    """
    path = Path(config.token_file)
    if config.host_registry:
        # The first worker of this launch hosts the registry, but any of them may be here first.
        return load_or_create_token(path)
    hint = "if another host has the registry, copy the file from there"
    what = f"the registry to make {path}"
    if not wait_until(path.exists, what, seconds=config.start_timeout, stop=stop, why=lambda: hint):
        raise WaitTimeout(f"stopped before {path} was there")
    return load_token(path)
