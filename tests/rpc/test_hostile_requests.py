"""Ten thousand hostile requests to a real server: it lives, runs nothing, answers each one, and serves on
with the same bits.
"""

import builtins
import functools
import operator
import os
import pickle
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attacker import SERVER, Answers, Gadget, attacked_server, pickled
from support.tiny_target import tiny_batch, tiny_mapping
from torch.distributed import rpc
from torch.distributed.rpc import rref_proxy

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.rpc.envelope import Failure, Ok
from eagle_rpc.rpc.link import call_hosted, hosted_rref
from eagle_rpc.service.endpoint import TargetEndpoint
from eagle_rpc.supervision import (
    AnswerPrompt,
    AnswerRequest,
    AnswerSettings,
    EncodedSupervision,
    GenerateRequest,
    SessionSpec,
    TargetExpectation,
    TokenBatch,
)

pytestmark = [pytest.mark.rpc, pytest.mark.slow]

NUM_REQUESTS = 10_000
# A target of the tests needs a few hundred kilobytes; the limits are low so that crossing them is cheap.
CONFIG = RpcConfig(max_pickle_bytes=2**18, max_request_bytes=2**20)


def ask(method: str, *arguments: Any) -> Any:
    return rpc.rpc_sync(SERVER, call_hosted, args=(method, *arguments), timeout=30)


def good_answer() -> dict[str, Any]:
    """The bits of a well-behaved request in a session of its own."""
    session = ask("open_session", SessionSpec(selected_token_ids=tiny_mapping().selected_token_ids)).value
    reply = ask("generate", request(session.id, incarnation(), tiny_batch(7)))
    ask("disconnect", session.id)
    assert isinstance(reply, Ok) and isinstance(reply.value, EncodedSupervision)
    return {
        name: getattr(reply.value, name).tolist()
        for name in ("aux", "supervised_rows", "values", "log_normalizer", "argmax")
    }


def incarnation() -> str:
    return ask("model_info").value.incarnation


def request(
    session: Any, of: Any, tokens: Any, *, request_id: Any = "r", seconds_left: Any = 20.0
) -> GenerateRequest:
    return GenerateRequest(
        session=session, incarnation=of, request_id=request_id, tokens=tokens, seconds_left=seconds_left
    )


# --- exploits by hand


def code_runners(directory: Path) -> list[Any]:
    """Objects that leave a file in `directory` when Python's own unpickler reads them."""
    shell = f"touch {directory}/canary"
    code = f"open({str(directory / 'canary')!r}, 'w')"
    return [
        Gadget(os.system, shell),
        Gadget(subprocess.getoutput, shell),
        Gadget(builtins.eval, code),
        Gadget(builtins.exec, code),
        Gadget(builtins.open, str(directory / "canary"), "w"),
        Gadget(os.mkdir, str(directory / "canary")),
        Gadget(functools.partial, os.system, shell),
        Gadget(map, os.system, [shell]),
        Gadget(list, Gadget(map, os.system, [shell])),
        Gadget(getattr, rpc.internal._InternalRPCPickler, "_script_module_receiver"),
        Gadget(getattr, rpc.internal._InternalRPCPickler, "__init__"),
        Gadget(getattr, Gadget(getattr, TokenBatch, "check"), "__globals__"),
        Gadget(getattr, call_hosted, "__globals__"),
        Gadget(operator.attrgetter, "system"),
        Gadget(operator.methodcaller, "system", shell),
        Gadget(builtins.__import__, "os"),
        Gadget(pickle.loads, pickle.dumps(Gadget(os.system, shell))),
        Gadget(torch.load, str(directory / "weights.pt")),
        Gadget(torch.jit.load, str(directory / "module.pt")),
        Gadget(torch.hub.load, "owner/repository", "model"),
        Gadget(torch._utils._rebuild_tensor_v2, None, 0, (1,), (1,), False, None),
        Gadget(rpc.internal._InternalRPCPickler._script_module_receiver, b"PK"),
        Gadget(rpc.internal._InternalRPCPickler._tensor_receiver, 10**9),
        Gadget(rpc.internal._InternalRPCPickler._tensor_receiver, -1),
        Gadget(rpc.internal._InternalRPCPickler._py_rref_receiver, (1, 1, 7, 2, 9, 2, "PyObject")),
        Gadget(rpc.internal._InternalRPCPickler._py_rref_receiver, (1, 1, 0, 2, 9, 2, "List[" * 5000)),
        Gadget(rpc.internal._InternalRPCPickler._py_rref_receiver, (2**70, 1, 0, 2, 9, 2, "PyObject")),
        Gadget(rpc.rpc_sync, SERVER, os.getpid),
        Gadget(call_hosted, "close"),
        torch.nn.Linear(2, 2),
        torch.nn.Parameter(torch.zeros(2)),
        torch.float32,
        os.system,
        TargetEndpoint,
        range(3),
        frozenset([1]),
    ]


def forbidden_calls(rref: Any, directory: Path) -> list[tuple[Any, ...]]:
    shell = f"touch {directory}/canary"
    calls = [
        (function, shell) for function in (os.system, subprocess.getoutput, eval, exec, print, os.listdir)
    ]
    for invoke in (rref_proxy._local_invoke, rref_proxy._local_invoke_async_execution):
        inherited = "__init__ __getattribute__ __reduce_ex__ __setattr__ __class__".split()
        for method in [*inherited, "close", "drain", "expire", "wait_sent", "_server", "nothing"]:
            calls.append((invoke, rref, method, (), {}))
        calls.append((invoke, rref, ["generate"], (), {}))
        calls.append((invoke, "rref", "generate", (), {}))
        calls.append((invoke, rref, "model_info", "args", {}))
        calls.append((invoke, rref, "model_info", (), 7))
    for method in (
        "close",
        "drain",
        "wait_sent",
        "__init__",
        "__class__",
        "",
        7,
        None,
        ["close"],
        ("close",),
    ):
        calls.append((call_hosted, method))
        calls.append((call_hosted, method, "model_info"))
    calls += [
        (rpc.api._gather_to_leader, "attacker0", "attacker", None, {"attacker", SERVER}),
        (rpc.api._broadcast_to_followers, "attacker0", {"attacker": None}),
        (rpc._utils._update_group_membership, rpc.WorkerInfo(SERVER, 1), [], {}, True),
        (rpc._utils._update_group_membership, rpc.WorkerInfo("attacker", 2), [], {}, False),
        (rpc.api._rref_typeof_on_owner, rref, True, 1, 2),
        (rpc.shutdown, False),
    ]
    return calls


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def call_of(function: bytes, arguments: bytes) -> bytes:
    return (
        b"\x80\x04"
        + name("torch.distributed.rpc.internal", "PythonUDF")
        + function
        + arguments
        + b"}\x87\x81."
    )


def bombs() -> list[bytes]:
    """Bytes by hand: what no pickler writes."""
    hosted = name("eagle_rpc.rpc.link", "hosted_rref")
    tokens = name("eagle_rpc.supervision.tokens", "TokenBatch")
    laughs = b"]\x94" + b"".join(b"]\x94(" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60))
    return [
        b"",
        b".",
        b"\x80\x04.",
        b"\x80\x04N",
        b"\x80\x04(.",
        b"\x80\xff" + b"N.",
        # Nested too deep to be hashed, as a key, a name and an argument.
        call_of(hosted, b")" + b"\x85" * 50_000),
        call_of(hosted, b"}" + b")" + b"\x85" * 50_000 + b"Ns\x85"),
        call_of(b")" + b"\x85" * 50_000, b")"),
        # A list that contains itself, and one that contains another twice, sixty times over.
        call_of(hosted, b"]\x94h\x00a\x85"),
        call_of(hosted, laughs + b"\x85"),
        # Attributes set on a class and on a function.
        call_of(hosted, tokens + b"N}" + text("check") + b"Ns\x86b\x85"),
        call_of(hosted, hosted + b"N}" + text("__code__") + b"Ns\x86b\x85"),
        # Objects without their fields, with others, with them twice.
        call_of(hosted, tokens + b")\x81\x85"),
        call_of(hosted, tokens + b")\x81N}" + text("check") + b"Ns\x86b\x85"),
        call_of(hosted, name("torch._C._distributed_rpc", "WorkerInfo") + b")\x81\x85"),
        call_of(hosted, name("eagle_rpc.service.endpoint", "TargetEndpoint") + b")\x81\x85"),
        # Lengths beyond the data.
        b"\x80\x04X\xff\xff\xff\xff.",
        b"\x80\x04B\xff\xff\xff\xff.",
        b"\x80\x04\x8d" + b"\xff" * 8 + b".",
        b"\x80\x04\x96" + b"\xff" * 8 + b".",
        b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
        b"\x80\x04\x8b\xff\xff\xff\x7f.",
        # A memo that would need 32 GiB, and one that is not there.
        b"\x80\x04Nr\xff\xff\xff\x7f.",
        b"\x80\x04Nj\xff\xff\xff\x7f.",
        # Globals and calls in every spelling of old pickles.
        b"cposix\nsystem\n(S'true'\ntR.",
        b"(S'true'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'true'\no.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04Ppersistent\n.",
        b"\x80\x04" + text("persistent") + b"Q.",
        # Text that no log could be written with.
        b"\x80\x04X\x03\x00\x00\x00\xed\xa0\x80.",
        # More operations than any message has, and more bytes.
        b"\x80\x04" + b"N0" * 60_000 + b"N.",
        b"\x80\x04(" + b"N" * 150_000 + b"t.",
        b"\x80\x04" + text("x" * 2**18) + b".",
    ]


def odd_tensors() -> list[torch.Tensor]:
    return [
        torch.zeros(2, 3),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(1, 2, 3, dtype=torch.int64),
        torch.full((1, 8), -1),
        torch.full((1, 8), 2**62),
        torch.full((1, 8), float("nan")),
        torch.ones(1, 8, dtype=torch.complex64),
        torch.eye(8, dtype=torch.int64).to_sparse(),
        torch.ones(1, 1, dtype=torch.int64).expand(1, 8),
        torch.ones(1, 10_000, dtype=torch.int64),
        torch.ones(2**17 + 1, dtype=torch.int64),
    ]


# --- requests that look valid, by hypothesis

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=5,
)
TENSORS = st.sampled_from(odd_tensors())
ANYTHING = PLAIN | TENSORS
MASKS = ANYTHING | st.none()
TOKENS = st.builds(
    TokenBatch, input_ids=ANYTHING, attention_mask=MASKS, loss_mask=MASKS, segment_ids=MASKS
) | st.integers(0, 2**30).map(tiny_batch)
EXPECTED = (
    st.builds(TargetExpectation, vocab_size=ANYTHING, aux_layer_ids=ANYTHING, dtype=ANYTHING) | ANYTHING
)
SPECS = st.builds(
    SessionSpec,
    selected_token_ids=ANYTHING,
    encoding=ANYTHING,
    rows=ANYTHING,
    expected=EXPECTED,
    run=ANYTHING,
    trainer=ANYTHING,
    answers=ANYTHING,
)
REQUESTS = st.builds(
    request, ANYTHING, ANYTHING, TOKENS | ANYTHING, request_id=ANYTHING, seconds_left=ANYTHING
)
NUMBERS = st.integers(-1, 70) | ANYTHING
ANSWER_SETTINGS = st.builds(
    AnswerSettings,
    max_new_tokens=NUMBERS,
    max_length=NUMBERS,
    stop_token_ids=st.lists(NUMBERS, max_size=3).map(tuple) | ANYTHING,
    temperature=NUMBERS,
    top_p=NUMBERS,
    top_k=NUMBERS,
    seed=NUMBERS,
)
PROMPTS = st.builds(
    AnswerPrompt,
    key=ANYTHING,
    token_ids=ANYTHING | st.lists(st.integers(-1, 100), max_size=70).map(torch.tensor),
    settings=ANSWER_SETTINGS | ANYTHING,
)
ANSWER_REQUESTS = st.builds(
    AnswerRequest,
    session=ANYTHING,
    incarnation=ANYTHING,
    request_id=ANYTHING,
    prompt=PROMPTS | ANYTHING,
    seconds_left=ANYTHING,
)
CALLS = st.one_of(
    st.tuples(st.just("generate"), REQUESTS | ANYTHING),
    st.tuples(st.just("answer"), ANSWER_REQUESTS | ANYTHING),
    st.tuples(st.just("open_session"), SPECS | ANYTHING),
    st.tuples(st.just("set_vocab_mapping"), ANYTHING),
    st.tuples(st.sampled_from(["heartbeat", "disconnect", "output_embeddings"]), ANYTHING),
    st.tuples(st.just("cancel"), ANYTHING, st.lists(ANYTHING, max_size=3) | ANYTHING),
    st.tuples(st.sampled_from(["model_info", "status", "input_embeddings"]), ANYTHING),
)


def mutations(valid: bytes, count: int) -> Iterator[bytes]:
    """A valid message with bytes changed, cut out, repeated or put in."""
    draw = random.Random(3)
    for _ in range(count):
        data = bytearray(valid)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            kind = draw.randrange(4)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                del data[at : at + draw.randint(1, 8)]
            elif kind == 2:
                data[at:at] = data[at : at + draw.randint(1, 16)]
            else:
                data[at:at] = draw.randbytes(draw.randint(1, 8))
        yield bytes(data)


def test_ten_thousand_hostile_requests_leave_a_server_unharmed(tmp_path: Path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "weights.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "module.pt")
    with attacked_server(CONFIG) as server:
        before = good_answer()
        pid = server.pid
        rref = rpc.rpc_sync(SERVER, hosted_rref)
        assert rref.rpc_sync().model_info().value.incarnation == incarnation()

        refused = Answers()
        for is_async in (False, True):
            for value in code_runners(tmp_path):
                refused.send(pickled(value), is_async=is_async)
            for data in bombs():
                refused.send(data, is_async=is_async)
        for function, *arguments in forbidden_calls(rref, tmp_path):
            refused.call(function, *arguments)
        refused.wait()
        assert refused.values == [] and len(refused.failures) == refused.sent
        arrived = [failure for failure in refused.failures if "PayloadRefused" not in failure]
        # Two nested values of plain types, sent twice, and three calls with arguments of the wrong kind.
        assert len(arrived) == 7 and all("TypeError" in failure for failure in arrived)

        sized = Answers()
        for _ in range(20):
            sized.call(call_hosted, "set_vocab_mapping", torch.zeros(2**18 + 1))
        sized.wait()
        assert sized.sent == 20 and all("rpc.max_request_bytes" in failure for failure in sized.failures)
        assert len(sized.failures) == 20

        typed = Answers()

        @settings(
            max_examples=5_000,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(CALLS)
        def ask_anything(call: tuple[Any, ...]) -> None:
            typed.call(call_hosted, *call)

        ask_anything()
        typed.wait()
        assert len(typed.values) + len(typed.failures) == typed.sent >= 2_500
        assert {type(value) for value in typed.values} <= {Ok, Failure}
        assert sum(isinstance(value, Failure) for value in typed.values) > typed.sent / 2

        mutated = Answers()
        rpc_bytes, tensors = rpc.internal.serialize(
            rpc.internal.PythonUDF(call_hosted, ("generate", request("s", "i", tiny_batch(1))), {})
        )
        missing = NUM_REQUESTS - refused.sent - sized.sent - typed.sent
        for data in mutations(rpc_bytes, missing):
            mutated.send(data, tensors, is_async=True)
        mutated.wait()
        assert len(mutated.values) + len(mutated.failures) == mutated.sent
        assert {type(value) for value in mutated.values} <= {Failure}

        assert refused.sent + sized.sent + typed.sent + mutated.sent == NUM_REQUESTS
        assert server.is_alive() and server.pid == pid
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("canary")] == []
        assert good_answer() == before
        assert rref.rpc_sync().generate(request("s", incarnation(), tiny_batch(1))).code == "unknown_session"
        del rref
