import gc
import threading
import weakref

import pytest
from torch.futures import Future

from eagle_rpc.errors import ConfigError, ConnectionLost, EagleRpcError, TargetFailed, WaitTimeout
from eagle_rpc.process import interface_address
from eagle_rpc.rpc import calls
from eagle_rpc.rpc.agent import check_bound_address
from eagle_rpc.rpc.calls import classify


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "RPCErr:1:RPC ran for more than set timeout (500 ms) and will now be marked with an error",
            WaitTimeout,
        ),
        ("eof (this error originated at tensorpipe/transport/shm/connection_impl.cc:259)", ConnectionLost),
        (
            "EPIPE: broken pipe (this error originated at tensorpipe/transport/uv/connection_impl.cc:132)",
            ConnectionLost,
        ),
        ("could not find destination id 7", ConnectionLost),
        ("On WorkerInfo(id=0, name=target0):\nKeyError('x')\nTraceback ...\nKeyError: 'x'\n", TargetFailed),
        (
            "On WorkerInfo(id=0, name=target0):\nRuntimeError: no map\nException raised from f at x.cpp:1\nframe #0: g",
            TargetFailed,
        ),
    ],
)
def test_torchs_texts_become_exceptions_that_name_peer_and_call(text: str, kind: type[EagleRpcError]):
    error = classify(RuntimeError(text), peer="target0", what="model_info")
    assert type(error) is kind
    assert "target0" in str(error) and "model_info" in str(error) and "\n" not in str(error)


def test_a_future_that_nobody_completes_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls, "_GRACE_SECONDS", 0.0)
    call = calls.PendingCall(Future(), peer="target0", what="request 7", timeout=0.01)
    with pytest.raises(WaitTimeout, match="target0 did not answer request 7"):
        call.result()


def test_a_result_that_is_no_longer_wanted_is_not_waited_for():
    call = calls.PendingCall(Future(), peer="target0", what="embeddings", timeout=1000)
    with pytest.raises(WaitTimeout, match="target0 had not answered embeddings when it was given up"):
        call.result(unless=lambda: True)


def test_a_result_that_arrives_while_waiting_is_returned():
    future: Future = Future()
    call = calls.PendingCall(future, peer="target0", what="request 7", timeout=30)
    threading.Thread(target=lambda: future.set_result(5)).start()
    assert call.result() == 5 and call.done


@pytest.mark.parametrize("raised", [KeyError, AttributeError, OSError, RuntimeError])
def test_whatever_class_the_peer_raised_becomes_ours(raised: type[Exception]):
    future: Future = Future()
    future.set_exception(raised("On WorkerInfo(id=0, name=target0):\nTraceback ...\nthe last line\n"))
    with pytest.raises(TargetFailed, match=r"^target0 raised during request 7: the last line$"):
        calls.PendingCall(future, peer="target0", what="request 7", timeout=30).result()


def test_a_call_that_failed_keeps_nothing_alive_that_its_caller_held():
    class Held:
        pass

    def fail() -> weakref.ref[Held]:
        held = Held()
        future: Future = Future()
        future.set_exception(RuntimeError("eof (this error originated at tensorpipe/transport/x.cc:1)"))
        with pytest.raises(ConnectionLost):
            calls.PendingCall(future, peer="target0", what="request 7", timeout=30).result()
        return weakref.ref(held)

    held = fail()
    gc.collect()
    assert held() is None


def test_loopback_is_found_and_an_unknown_interface_is_refused():
    assert interface_address("lo") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"rpc\.interface must be a network interface .* got 'nope0'"):
        interface_address("nope0")


def test_an_agent_on_another_address_is_refused():
    check_bound_address("uv://127.0.0.1:4000", "127.0.0.1")
    with pytest.raises(ConfigError, match=r"has address 127\.0\.0\.1, but RPC listens on 10\.0\.0\.5"):
        check_bound_address("uv://10.0.0.5:4000", "127.0.0.1")
