"""The envelopes of the server's answers."""

import subprocess
import sys

import pytest
import torch
from server_calls import SELECTED, open_session, request

from eagle_rpc.rpc.envelope import Failure, Ok
from eagle_rpc.service.endpoint import CONTROL_METHODS, TargetEndpoint
from eagle_rpc.supervision import EncodedSupervision, SessionSpec
from eagle_rpc.target.model import HFEagle3TargetModel


@pytest.fixture
def server(serve, model):
    return serve(HFEagle3TargetModel(model))


@pytest.fixture
def endpoint(server):
    return TargetEndpoint(server)


def test_importing_the_endpoint_loads_no_model_code():
    code = "import eagle_rpc.service.endpoint, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_peers_may_call_every_method_and_none_that_ends_the_server():
    methods = "answer cancel disconnect generate heartbeat input_embeddings model_info open_session "
    methods += "output_embeddings probe_transfer set_vocab_mapping status"
    assert sorted(CONTROL_METHODS) == methods.split()


@pytest.mark.parametrize("method", sorted(CONTROL_METHODS))
def test_methods_return_futures_and_are_marked_as_asynchronous(method):
    assert hasattr(getattr(TargetEndpoint, method), "_wrapped_async_rpc_function")


def test_values_travel_in_ok(server, endpoint):
    assert endpoint.model_info().wait() == Ok(server.model_info())
    session = endpoint.open_session(SessionSpec(selected_token_ids=SELECTED)).wait().value.id
    assert endpoint.heartbeat(session).wait().value.draining is False
    assert isinstance(endpoint.generate(request(server, session)).wait().value, EncodedSupervision)
    assert endpoint.probe_transfer().wait().value.tolist() == list(range(2**16))
    assert endpoint.disconnect(session).wait() == Ok(None)


def test_errors_travel_as_failures_with_their_code(server, endpoint):
    assert endpoint.heartbeat("nobody").wait().code == "unknown_session"
    assert endpoint.generate(request(server, "nobody")).wait().code == "unknown_session"
    session = open_session(server)
    late = endpoint.generate(request(server, session, seconds_left=1e-9)).wait()
    assert isinstance(late, Ok), "the clock of this server stands still"
    server.drain(1e-9)
    refused = endpoint.generate(request(server, session)).wait()
    assert refused == Failure("draining", "the target is shutting down and takes no new requests")


@pytest.mark.parametrize(
    "call", ["output_embeddings", "heartbeat", "disconnect", "open_session", "set_vocab_mapping", "generate"]
)
@pytest.mark.parametrize("junk", [None, -7, b"x", [], torch.ones(2), object()])
def test_junk_never_raises(endpoint, call, junk):
    assert isinstance(getattr(endpoint, call)(junk).wait(), Failure)
