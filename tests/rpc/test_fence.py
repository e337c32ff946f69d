"""The fence around real agents: what it lets through, what it refuses, and what goes past it."""

import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.attacker import SERVER, Answers, Gadget, attacked_server, pickled, stock_agent
from support.tiny_target import tiny_mapping
from support.workers import forking
from torch.distributed import rpc
from torch.distributed.rpc.functions import async_execution
from torch.futures import Future

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConfigError, PayloadRefused
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.rpc import PendingCall, Permissions, host, withdraw
from eagle_rpc.rpc.agent import running_agent
from eagle_rpc.rpc.calls import classify
from eagle_rpc.rpc.envelope import Ok
from eagle_rpc.rpc.fence import install_fence, probe_fence
from eagle_rpc.rpc.link import Link, call_hosted, hosted_rref
from eagle_rpc.supervision import SessionSpec, TargetExpectation
from eagle_rpc.topology import Role

pytestmark = pytest.mark.rpc

CONFIG = RpcConfig()
ME = "alone0"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A fenced target in a process of its own; this process is a peer without a fence."""
    with attacked_server(CONFIG) as process:
        yield process


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns in a process of its own: an agent and its fence are for the whole process."""
    receiver, sender = forking.Pipe(duplex=False)
    process = forking.Process(target=_report, args=(sender, function, args), daemon=True)
    process.start()
    assert receiver.poll(90), "the process did not answer within 90 s"
    ok, value = receiver.recv()
    process.join(20)
    assert ok, value
    return value


def _report(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send((True, function(*args)))
    except BaseException:  # noqa: BLE001 - whatever went wrong, the test has to show it
        sender.send((False, traceback.format_exc()))


def alone(permissions: Permissions) -> Any:
    return running_agent(
        ME,
        worker_id=1,
        world_size=None,
        store=dist.HashStore(),
        config=CONFIG,
        device_maps={},
        permissions=permissions,
    )


class Greeter:
    """Hosted by these tests."""

    @async_execution
    def greet(self, whom: str) -> Future:
        greeting: Future = Future()
        greeting.set_result(Ok(f"hello {whom}"))
        return greeting

    def forget(self) -> None:
        """Not permitted."""


def greeter_permissions(**changes: Any) -> Permissions:
    return Permissions(
        **{
            "functions": frozenset([hosted_rref, call_hosted]),
            "methods": {Greeter: frozenset(["greet"])},
            "types": frozenset([Ok, SessionSpec, TargetExpectation]),
            "proxied": frozenset([Greeter]),
            "max_pickle_bytes": 2**20,
            "max_request_bytes": 2**20,
            **changes,
        }
    )


def greeting_and_refusals() -> list[str]:
    answers = []
    # Twice: a process may end its agent and start another one.
    for _ in range(2):
        with alone(greeter_permissions()):
            probe_fence()
            host(Greeter(), frozenset(["greet"]))
            link = Link(peer=ME, incarnation="", data_name=ME, control_name=ME, between_gpus=False)
            link.use_rref(20)
            answers.append(link.call("greet", "you", what="a greeting", timeout=20).result())
            answers.append(link.control("greet", "them", timeout=20).result())
            for call in (
                link.call("forget", what="forgetting", timeout=20),
                link.control("forget", timeout=20),
                PendingCall(rpc.rpc_async(ME, os.getpid), peer=ME, what="its pid", timeout=20),
            ):
                try:
                    answers.append(f"let in: {call.result()}")
                except PayloadRefused as error:
                    answers.append(str(error))
            link.release()
            withdraw()
    return answers


def test_what_is_listed_is_answered_and_the_rest_is_refused_in_one_agent_and_the_next():
    once = [
        "hello you",
        "hello them",
        "alone0 refused forgetting: a method of Greeter must be one that is listed, got forget",
        "alone0 refused forget: 'forget' must be a method that this process offers by name",
        "alone0 refused its pid: an RPC message must not name posix.getpid",
    ]
    assert in_a_process(greeting_and_refusals) == once * 2


def trainer_answers() -> list[str]:
    with alone(permissions(CONFIG, Role.trainer)):
        host(Greeter(), frozenset(["greet"]))
        refusals = []
        for function, *arguments in (
            (hosted_rref,),
            (call_hosted, "greet", "you"),
            (os.getpid,),
        ):
            with pytest.raises(RuntimeError) as refused:
                rpc.rpc_sync(ME, function, args=tuple(arguments), timeout=20)
            refusals.append(type(classify(refused.value, peer=ME, what="it")).__name__)
        return refusals


def test_a_trainer_may_be_asked_nothing():
    assert in_a_process(trainer_answers) == ["PayloadRefused"] * 3


def fence_while_an_agent_runs() -> str:
    with alone(greeter_permissions()), pytest.raises(ConfigError) as refused:
        install_fence(greeter_permissions())
    return str(refused.value)


def test_a_fence_that_would_come_too_late_is_refused():
    assert "must be installed before RPC starts" in in_a_process(fence_while_an_agent_runs)


def agent_of_a_changed_torch() -> str:
    def deserialize(data: bytes) -> None:
        """Takes other parameters than the fence knows."""

    rpc.internal.deserialize = deserialize
    with pytest.raises(ConfigError) as refused, alone(greeter_permissions()):
        raise AssertionError("an agent without a fence listens")
    assert not rpc.api._is_current_rpc_agent_set()
    return str(refused.value)


def test_nothing_listens_when_torch_is_not_as_the_fence_requires():
    assert "internal.deserialize must take (binary_data, tensor_table)" in in_a_process(
        agent_of_a_changed_torch
    )


def probe_without_a_fence() -> str:
    with stock_agent(), pytest.raises(ConfigError) as refused:
        probe_fence()
    return str(refused.value)


def test_an_agent_that_goes_past_the_fence_is_noticed():
    assert "bypasses the fence around RPC" in in_a_process(probe_without_a_fence)


def run_exploit(path: str) -> bool:
    with stock_agent():
        rpc.api._invoke_rpc_python_udf(
            rpc.get_worker_info(), pickled(Gadget(os.mkdir, path)), [], 20.0, False
        )
        rpc.rpc_sync(rpc.get_worker_info(), len, args=([],), timeout=20)
    return os.path.exists(path)


def test_without_the_fence_the_exploits_of_these_tests_work(tmp_path: Path):
    assert in_a_process(run_exploit, str(tmp_path / "canary"))


def test_the_way_that_a_caller_chooses_to_wait_for_an_answer_harms_nothing(server: Any):
    answers = Answers()
    for is_async in (False, True):
        for call in ((call_hosted, ("model_info",)), (hosted_rref, ())):
            answers.send(rpc.internal.serialize(rpc.internal.PythonUDF(*call, {}))[0], is_async=is_async)
    answers.wait()
    # Those that named the wrong way fail, and only those.
    assert len(answers.values) == len(answers.failures) == 2
    assert rpc.rpc_sync(SERVER, call_hosted, args=("model_info",), timeout=20).value.architecture


@pytest.mark.parametrize(
    "value", [None, 7, "text", [1], {"a": 1}, rpc.internal.RemoteException("told", RuntimeError)]
)
def test_a_message_that_is_no_call_is_a_failure(server: Any, value: Any):
    answers = Answers()
    answers.send(rpc.internal.serialize(value)[0])
    answers.wait()
    assert answers.values == [] and len(answers.failures) == 1


def test_tensors_beyond_the_limit_are_refused_even_if_the_call_does_not_use_them(server: Any):
    limit = CONFIG.max_request_bytes
    data, _ = rpc.internal.serialize(rpc.internal.PythonUDF(hosted_rref, (), {}))
    whole, view = torch.zeros(limit // 4), torch.zeros(limit // 4 + 1)[: limit // 6]
    answers = Answers()
    answers.send(data, [whole])
    answers.wait()
    assert len(answers.values) == 1
    answers.send(data, [whole, torch.zeros(1)])
    answers.send(data, [view, whole])
    answers.wait()
    assert len(answers.values) == 1 and len(answers.failures) == 2
    assert all("rpc.max_request_bytes" in failure for failure in answers.failures)


def test_what_an_rref_holds_does_not_come_when_it_is_fetched(server: Any):
    rref = rpc.rpc_sync(SERVER, hosted_rref, timeout=20)
    fetched = rref.to_here()
    assert vars(fetched) == {}


def test_an_rref_that_was_not_handed_out_is_refused_at_once(server: Any):
    rref = rpc.rpc_sync(SERVER, hosted_rref, timeout=20)
    owner, created_on, local_id, *rest = rref._serialize()
    forged = Gadget(
        rpc.internal._InternalRPCPickler._py_rref_receiver, (owner, created_on, local_id + 1000, *rest)
    )
    answers = Answers()
    answers.call(rpc.rref_proxy._local_invoke, forged, "model_info", (), {})
    answers.wait()
    assert answers.values == [] and "only to objects that were handed out" in answers.failures[0]


def test_a_method_reached_by_rref_validates_as_one_reached_by_name(server: Any):
    rref = rpc.rpc_sync(SERVER, hosted_rref, timeout=20)
    spec = SessionSpec(selected_token_ids=tiny_mapping().selected_token_ids, encoding="morse")
    assert rref.rpc_sync().open_session(spec).code == "invalid_request"


def test_limit_operators_below_python_go_past_the_fence(server: Any, tmp_path: Path):
    """Documents what `docs/security.md` says stays open. If this fails, torch has closed it: say so there."""
    path = tmp_path / "made by the server"
    rpc.rpc_sync(
        SERVER,
        torch.from_file,
        args=(str(path),),
        kwargs={"shared": True, "size": 4, "dtype": torch.uint8},
        timeout=20,
    )
    assert path.stat().st_size == 4


def test_a_target_may_not_be_ended_by_its_clients():
    (methods,) = permissions(CONFIG, Role.target).methods.values()
    assert methods.isdisjoint(["close", "drain", "wait_sent", "let_go"])
