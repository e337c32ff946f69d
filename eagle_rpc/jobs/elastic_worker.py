"""What targets and trainers of an elastic service do alike."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from eagle_rpc.config import Config
from eagle_rpc.registry import RegistryClient, load_or_create_token, load_token
from eagle_rpc.rpc import ElasticMembership, Permissions, join_elastic
from eagle_rpc.topology import Role


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
    # Of a launch whose first worker hosts the registry, any may come first.
    token = (load_or_create_token if config.rpc.host_registry else load_token)(Path(config.rpc.token_file))
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
