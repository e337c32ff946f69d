"""Servers of tiny random targets."""

import pytest
from answer_calls import ScriptedAnswering
from gated_target import GatedTarget
from server_calls import Clock, config

from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.target.model import HFEagle3TargetModel


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def serve(clock):
    """Starts servers whose time stands still."""
    servers = []

    def start(target, **changes):
        servers.append(TargetModelServer(target, config(**changes), clock=clock))
        return servers[-1]

    yield start
    for server in servers:
        assert server.close()


@pytest.fixture
def gated(model):
    target = GatedTarget(HFEagle3TargetModel(model))
    yield target
    target.opened.set()


@pytest.fixture
def answering():
    made = ScriptedAnswering()
    yield made
    made.opened.set()


@pytest.fixture
def serve_answers(model, clock):
    servers = []

    def start(answering, target=None, **changes):
        target = target or HFEagle3TargetModel(model)
        servers.append(TargetModelServer(target, config(**changes), answering=answering, clock=clock))
        return servers[-1]

    yield start
    for server in servers:
        assert server.close()
