"""What targets and trainers of an elastic service do alike."""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from eagle_rpc.config import Config
from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.registry import RegistryClient, load_or_create_token, load_token
from eagle_rpc.rpc import ElasticMembership, Permissions, join_elastic
from eagle_rpc.topology import Role

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


def announced(
    config: Config,
    name: str,
    role: Role,
    device: torch.device,
    permissions: Permissions,
    *,
    when_superseded: Callable[[], None],
) -> contextlib.AbstractContextManager[ElasticMembership]:
    """This worker's membership, announced at the registry that the configuration names, while the body runs."""
    token = _token(config.rpc)
    return join_elastic(
        name,
        role.value,
        job=config.run.name if role is Role.trainer else "",
        device=str(device),
        config=config.rpc,
        permissions=permissions,
        registry=RegistryClient(config.rpc.registry, token),
        when_superseded=when_superseded,
    )


def _token(config: RpcConfig) -> bytes:
    """The registry's secret; waits for whoever hosts the registry to make it, `config.start_timeout` at most."""
    path = Path(config.token_file).expanduser()
    if config.host_registry:
        # Of a launch whose first worker hosts the registry, any may come first.
        return load_or_create_token(path)
    deadline = time.monotonic() + config.start_timeout
    if not path.exists():
        logger.info("waiting for the registry to make %s, %.0f s at most", path, config.start_timeout)
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return load_token(path)
