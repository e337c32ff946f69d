"""A real server in this process, and clients of it that are closed when the test ends."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_membership import FakeMembership, remote_model
from support.tiny_target import tiny_mapping, tiny_target_config

from eagle_rpc.client import RemoteEagle3TargetModel
from eagle_rpc.jobs.answering import EngineAnswering
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.target.model import HFEagle3TargetModel


def serve_tiny_target(seed: int) -> TargetModelServer:
    target = HFEagle3TargetModel.load(tiny_target_config(), "cpu", cache_dir="unused", seed=seed)
    return TargetModelServer(target, tiny_target_config(), answering=EngineAnswering(target.model))


@pytest.fixture(scope="module")
def server() -> Iterator[TargetModelServer]:
    made = serve_tiny_target(seed=0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def foreign_server() -> Iterator[TargetModelServer]:
    """The same architecture with other weights."""
    made = serve_tiny_target(seed=1)
    yield made
    made.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., RemoteEagle3TargetModel]]:
    """Makes clients with an open session."""
    made: list[RemoteEagle3TargetModel] = []

    def open_one(membership: FakeMembership, **changes: Any) -> RemoteEagle3TargetModel:
        made.append(remote_model(membership, **changes))
        made[-1].open_session(tiny_mapping())
        return made[-1]

    yield open_one
    for backend in made:
        backend.close()
