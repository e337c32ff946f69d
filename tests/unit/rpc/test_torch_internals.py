"""One test for each private part of torch that `rpc/internals.py` relies on: a new torch fails here and says
what changed.
"""

import pickle
import pickletools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.attacker import ATTACKER as ME
from support.attacker import ATTACKER_ID as MY_ID
from support.attacker import stock_agent
from torch.distributed import rpc
from torch.distributed.rpc import api, internal

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConfigError, PayloadRefused
from eagle_rpc.rpc import internals


class Hosted:
    pass


@pytest.fixture
def agent() -> Iterator[Any]:
    """torch's own agent in this process."""
    with stock_agent():
        yield api._get_current_rpc_agent()


def test_this_torch_is_as_the_fence_requires():
    internals.check_internals()


@pytest.mark.parametrize(
    ("owner", "name", "replacement"),
    [
        (internal, "deserialize", lambda data: None),
        (internal, "_run_function", None),
        (internal, "PythonUDF", tuple),
        (internal, "RemoteException", tuple),
        (api, "_gather_to_leader", lambda *anything: None),
        (internal._InternalRPCPickler, "_tensor_receiver", None),
    ],
)
def test_another_torch_is_refused_with_the_name_of_the_part(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, replacement: Any
):
    if isinstance(owner, type):
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(
        ConfigError, match=rf"{owner.__name__}\.{name} must take .* torch {torch.__version__[:4]}"
    ):
        internals.check_internals()


def test_options_take_transports(agent: Any):
    options = agent._get_backend_options()
    assert (
        options.num_worker_threads == RpcConfig().worker_threads
        and options.rpc_timeout == RpcConfig().request_timeout
    )
    assert internals.bound_url(ME).startswith("uv://127.0.0.1:") and "shm" not in internals.bound_url(ME)


def test_whether_an_agent_runs_and_who_it_is_can_be_asked(agent: Any):
    assert internals.agent_runs()
    assert internals.my_name() == internals.WorkerName(ME, MY_ID)
    assert not internals.in_static_world()


def test_without_an_agent_none_runs():
    assert not internals.agent_runs()


def test_a_second_name_for_a_known_url_is_called_and_forgotten(agent: Any):
    internals.add_peer("control", 77, internals.bound_url(ME), {})
    assert rpc.get_worker_info("control").id == 77
    assert rpc.rpc_sync("control", len, args=([1, 2],), timeout=20) == 2
    internals.remove_peer("control", 77)
    with pytest.raises(RuntimeError):
        rpc.get_worker_info("control")


def test_forgetting_one_peer_keeps_the_others(agent: Any):
    for name, worker_id in (("one", 77), ("other", 78)):
        internals.add_peer(name, worker_id, internals.bound_url(ME), {})
    internals.remove_peer("one", 77)
    assert rpc.rpc_sync("other", len, args=([1, 2],), timeout=20) == 2


def test_an_rref_names_its_object_in_its_text_and_when_it_travels(agent: Any):
    one, other = rpc.RRef(Hosted()), rpc.RRef(Hosted())
    fork = one._serialize()
    assert internals.fork_identity(fork) == (MY_ID, internals.rref_id(one))
    assert internals.rref_id(one) != internals.rref_id(other)
    assert internals.rref_id(internals.receive_rref(fork)) == internals.rref_id(one)


@pytest.mark.parametrize(
    "fork", [None, (), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, "List[int]"), (1, 2, 3, 4, 5, "6", "PyObject")]
)
def test_a_malformed_rref_is_refused_before_torch_reads_it(fork: Any):
    with pytest.raises(PayloadRefused, match="six numbers and the type PyObject"):
        internals.fork_identity(fork)


def globals_in(data: bytes) -> set[str]:
    """Texts in a pickle: names of what it refers to are among them."""
    return {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}


def test_a_call_with_a_tensor_is_pickled_as_the_reader_expects():
    data, tensors = internal.serialize(internals.Call(len, (torch.zeros(2),), {}))
    assert len(tensors) == 1
    names = {
        "torch.distributed.rpc.internal",
        "PythonUDF",
        "_InternalRPCPickler",
        "builtins",
        "getattr",
        "len",
    }
    assert globals_in(data) == names | {internals.TENSOR_RECEIVER}


def test_a_call_with_an_rref_is_pickled_as_the_reader_expects(agent: Any):
    data, tensors = internal.serialize(internals.Call(len, (rpc.RRef(Hosted()),), {}))
    assert tensors == []
    assert {internals.RREF_RECEIVER, "PyObject"} < globals_in(data)


def test_a_worker_is_pickled_as_name_and_id():
    data = pickle.dumps(rpc.WorkerInfo("alone", 3))
    operations = [
        operation.name
        for operation, _, _ in pickletools.genops(data)
        if operation.name not in ("PROTO", "FRAME", "MEMOIZE")
    ]
    cls = ["SHORT_BINUNICODE", "SHORT_BINUNICODE", "STACK_GLOBAL"]
    fields = ["SHORT_BINUNICODE", "BININT1", "TUPLE2", "BUILD"]
    assert operations == [*cls, "EMPTY_TUPLE", "NEWOBJ", *fields, "STOP"]


def test_torch_calls_what_replaces_its_handlers(monkeypatch: pytest.MonkeyPatch):
    heard = []

    def deserialize(binary_data: bytes, tensor_table: list[torch.Tensor]) -> Any:
        heard.append(type(binary_data))
        return stock[0](binary_data, tensor_table)

    def run(python_udf: Any) -> Any:
        heard.append(type(python_udf))
        return stock[1](python_udf)

    stock = internal.deserialize, internal._run_function
    for name, function in zip(("deserialize", "_run_function"), stock, strict=True):
        monkeypatch.setattr(internal, name, function)
    internals.replace_handlers(deserialize=deserialize, run=run)
    with stock_agent():
        assert rpc.rpc_sync(ME, len, args=([1],), timeout=20) == 1
    assert {bytes, internals.Call} <= set(heard)


def test_a_failure_in_place_of_a_value_is_raised_at_the_caller():
    with pytest.raises(RuntimeError, match=r"^a line\nand another$"):
        internal._handle_exception(internals.RemoteFailure("a line\\nand another", RuntimeError))
