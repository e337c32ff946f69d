"""A hostile peer that knows the registry's token. It has a process of its own, since it needs an RPC agent.

Each act asks one target and writes the outcome as JSON to the file that `Act` names.
"""

import contextlib
import json
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.attacker import Gadget, lone_agent
from support.waiting import pause
from torch.distributed import rpc

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.registry import Record, RegistryClient, load_token
from eagle_rpc.rpc.envelope import Failure, Ok, unwrap
from eagle_rpc.rpc.internals import add_peer
from eagle_rpc.rpc.link import call_hosted
from eagle_rpc.supervision import GenerateRequest, SessionSpec, TokenBatch
from eagle_rpc.topology import Role
from faults.connections import listening_port, send
from faults.workspace import MAX_PICKLE_BYTES, MAX_REQUEST_BYTES

_TIMEOUT = 15.0  # seconds of one call
_RECORDER_SECONDS = 2.0
_MASKS = ("input_ids", "attention_mask", "loss_mask")
_VOCAB, _NUM_SESSIONS, _NUM_REQUESTS = 300, 5, 12


@dataclass
class Outcome:
    """The target's answers to one act."""

    asked: int = 0
    as_promised: int = 0  # refused if it must be refused, granted if it may be
    wrong: list[str] = field(default_factory=list)  # granted although hostile, or not answered


@dataclass(frozen=True)
class Rogue:
    """The running agent of this process, and its victim."""

    target: Record
    draw: random.Random
    marker: Path  # exists if a command was executed
    outcome: Outcome

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return rpc.rpc_sync(self.target.name, function, args=arguments, timeout=_TIMEOUT)

    def expect_refusal(self, attack: str, function: Callable[..., Any], *arguments: Any) -> None:
        self.outcome.asked += 1
        try:
            answer = self.ask(function, *arguments)
        except RuntimeError as error:
            refused = "RPC ran for more" not in str(error) and "tensorpipe" not in str(error)
            answer = error
        else:
            refused = isinstance(answer, Failure)
        if refused:
            self.outcome.as_promised += 1
        else:
            self.outcome.wrong.append(f"{attack}: {answer!r:.300}")

    def call(self, method: str, *arguments: Any) -> Any:
        return self.ask(call_hosted, method, *arguments)


def alike(mask_BT: torch.Tensor) -> TokenBatch:
    return TokenBatch(**dict.fromkeys(_MASKS, mask_BT))


def tokens(**changes: Any) -> TokenBatch:
    return TokenBatch(**(dict.fromkeys(_MASKS, torch.ones(2, 8, dtype=torch.int64)) | changes))


def spec(**changes: Any) -> SessionSpec:
    return SessionSpec(
        **({"selected_token_ids": torch.arange(32), "run": "rogue", "trainer": "rogue"} | changes)
    )


# --- acts


def hostile_pickles(rogue: Rogue) -> None:
    """Calls that would run a command or reach beyond the service."""
    command = f"touch {rogue.marker}"
    nested = Gadget(eval, f"open({str(rogue.marker)!r}, 'w')")
    too_large = torch.zeros(MAX_REQUEST_BYTES + 1, dtype=torch.uint8)
    attacks: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("os.system", os.system, (command,)),
        ("eval", eval, (f"__import__('os').system({command!r})",)),
        ("exec", exec, (f"import os; os.system({command!r})",)),
        ("gadget", call_hosted, (Gadget(os.system, command),)),
        ("nested gadget", call_hosted, ("heartbeat", {"a": [nested]})),
        ("getattr gadget", call_hosted, (Gadget(getattr, "", "join"),)),
        ("a class of torch", call_hosted, (torch.nn.Linear(2, 2),)),
        ("a method that is not offered", call_hosted, ("close",)),
        ("a private method", call_hosted, ("__class__",)),
        ("an import", __import__, ("os",)),
        ("a file", open, (str(rogue.marker), "w")),
        ("much pickle", call_hosted, ("heartbeat", "x" * (MAX_PICKLE_BYTES + 1))),
        ("many tensors", call_hosted, ("heartbeat", too_large)),
    ]
    for attack, function, arguments in rogue.draw.sample(attacks, len(attacks)):
        rogue.expect_refusal(attack, function, *arguments)


def malformed_requests(rogue: Rogue) -> None:
    """Calls of the service that break a rule."""
    session = unwrap(rogue.call("open_session", spec()), sender=rogue.target.name).id
    incarnation = unwrap(rogue.call("model_info"), sender=rogue.target.name).incarnation
    ones = torch.ones(2, 8, dtype=torch.int64)

    def request(batch: TokenBatch | None = None, **changes: Any) -> GenerateRequest:
        fields = {
            "session": session,
            "incarnation": incarnation,
            "request_id": "r",
            "seconds_left": 5.0,
            "tokens": batch or tokens(),
        }
        return GenerateRequest(**(fields | changes))

    left_padded = ones.clone()
    left_padded[:, 0] = 0
    mistakes: list[tuple[str, tuple[Any, ...]]] = [
        ("no request", ("generate", None)),
        ("text", ("generate", "give me all")),
        ("unknown session", ("generate", request(session="0" * 32))),
        ("session of another type", ("generate", request(session=7))),
        ("stale incarnation", ("generate", request(incarnation="0" * 32))),
        ("no tokens", ("generate", request(tokens=None))),
        ("time that is no number", ("generate", request(seconds_left=float("nan")))),
        ("ids beyond the vocabulary", ("generate", request(tokens(input_ids=ones * _VOCAB)))),
        ("negative ids", ("generate", request(tokens(input_ids=-ones)))),
        ("ids of another dtype", ("generate", request(tokens(input_ids=ones.float())))),
        ("shapes that differ", ("generate", request(tokens(loss_mask=ones[:, :4])))),
        ("padding on the left", ("generate", request(tokens(attention_mask=left_padded)))),
        ("an empty batch", ("generate", request(alike(ones[:0])))),
        ("masks of other values", ("generate", request(tokens(loss_mask=ones * 3)))),
        ("a long sequence", ("generate", request(alike(torch.ones(1, 4096, dtype=torch.int64))))),
        ("many tokens", ("generate", request(alike(torch.ones(600, 128, dtype=torch.bool))))),
        ("duplicate ids", ("open_session", spec(selected_token_ids=torch.zeros(4, dtype=torch.int64)))),
        ("an unknown encoding", ("open_session", spec(encoding="zip"))),
        ("a mapping of text", ("open_session", spec(selected_token_ids="all"))),
        ("a float mapping", ("set_vocab_mapping", torch.rand(4))),
        ("a heartbeat of nobody", ("heartbeat", "0" * 32)),
        ("the head of nobody", ("output_embeddings", "0" * 32)),
        ("too few arguments", ("heartbeat",)),
    ]
    for mistake, (method, *arguments) in rogue.draw.sample(mistakes, len(mistakes)):
        rogue.expect_refusal(mistake, call_hosted, method, *arguments)
    rogue.call("disconnect", session)


def abandoned_sessions(rogue: Rogue) -> None:
    """Opens sessions, asks for work in each and dies without closing them."""
    incarnation = unwrap(rogue.call("model_info"), sender=rogue.target.name).incarnation
    for number in range(_NUM_SESSIONS):
        answer = rogue.call("open_session", spec(trainer=f"rogue{number}"))
        rogue.outcome.asked += 1
        if not isinstance(answer, Ok):
            rogue.outcome.wrong.append(f"session {number}: {answer!r:.300}")
            continue
        for index in range(_NUM_REQUESTS):
            request = GenerateRequest(
                session=answer.value.id,
                incarnation=incarnation,
                request_id=str(index),
                seconds_left=10.0,
                tokens=tokens(),
            )
            rpc.rpc_async(rogue.target.name, call_hosted, args=("generate", request), timeout=_TIMEOUT)
        rogue.outcome.as_promised += 1


def truncated_messages(rogue: Rogue) -> None:
    """Sends the beginning of a real conversation and stops in the middle."""
    opening = recorded_opening()
    port = listening_port(rogue.target.url)
    for _ in range(3):
        rogue.outcome.asked += 1
        send(port, opening[: rogue.draw.randrange(1, len(opening))])
        rogue.outcome.as_promised += 1


def recorded_opening() -> bytes:
    """The first bytes that this agent sends to a peer."""
    with socket.create_server(("127.0.0.1", 0)) as recorder:
        recorder.settimeout(_RECORDER_SECONDS)
        add_peer("recorder", 2**15 - 2, f"uv://127.0.0.1:{recorder.getsockname()[1]}", {})
        rpc.rpc_async("recorder", call_hosted, args=("model_info",), timeout=_RECORDER_SECONDS)
        connection, _ = recorder.accept()
        with connection:
            connection.settimeout(_RECORDER_SECONDS)
            # The agent writes its first message in several pieces.
            pause(0.1)
            return connection.recv(2**16)


_ALL = (hostile_pickles, malformed_requests, abandoned_sessions, truncated_messages)
ACTS = {act.__name__: act for act in _ALL}


# --- the worker


@dataclass(frozen=True, kw_only=True)
class Act:
    """The order for one rogue."""

    name: str
    target: str
    registry: str
    token_file: str
    seed: int
    marker: str
    outcome: str  # file

    def to_arguments(self) -> list[str]:
        return [json.dumps(asdict(self))]


def main() -> None:
    act = Act(**json.loads(sys.argv[1]))
    with peer_of(act) as rogue:
        ACTS[act.name](rogue)
        partial = Path(f"{act.outcome}.partial")
        partial.write_text(json.dumps(asdict(rogue.outcome)))
        partial.rename(act.outcome)
        # A hostile peer does not say goodbye.
        os._exit(0)


@contextlib.contextmanager
def peer_of(act: Act) -> Iterator[Rogue]:
    registry = RegistryClient(act.registry, load_token(Path(act.token_file)))
    target = next(one for one in registry.living() if one.name == act.target)
    config = RpcConfig(registry=act.registry, token_file=act.token_file, request_timeout=_TIMEOUT)
    worker_id = registry.new_id()
    with lone_agent(f"rogue:{worker_id}", worker_id, config, permissions(config, Role.trainer)):
        add_peer(target.name, target.id, target.url, {})
        yield Rogue(target, random.Random(act.seed), Path(act.marker), Outcome())
