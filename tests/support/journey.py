"""Records the files of the package that one batch passes, on its way to the model and back to the loss."""

import contextlib
import dataclasses
import inspect
import itertools
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from support.service_training import service_config
from support.tiny_target import VOCAB_SIZE, tiny_mapping

import eagle_rpc
from eagle_rpc.client.dispatcher import PendingRequest
from eagle_rpc.config.schema import SupervisionConfig, TopologyConfig
from eagle_rpc.data import BatchPlan, ChatDataset
from eagle_rpc.data.dataset import Example
from eagle_rpc.jobs.assembly import connect_target, make_draft
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.jobs.serve import load_server
from eagle_rpc.process import read_world
from eagle_rpc.rpc import fence, join_static
from eagle_rpc.service.forward_pass import StartedPass
from eagle_rpc.service.lifecycle import TargetLifecycle
from eagle_rpc.supervision import (
    DraftTargets,
    Eagle3TargetBatch,
    EncodedSupervision,
    ReadSupervision,
    TargetOutput,
)
from eagle_rpc.supervision.rows import RowsRead
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.topology import assign_roles, plan_devices
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.learner import Learner

# By file, the functions of it that receive or return the batch.
Files = dict[str, set[str]]

_PACKAGE = str(Path(eagle_rpc.__file__).parent) + "/"
_SUPERVISION = (TargetOutput, RowsRead, ReadSupervision, EncodedSupervision, Eagle3TargetBatch, DraftTargets)
# The plain classes that carry a batch or its supervision: their attributes are looked into as a dataclass's are.
_CARRIERS = (PendingRequest, StartedPass)
_DEPTH = 5


class Journey:
    """The functions that receive or return the ids of a batch before the target has run, its supervision after."""

    def __init__(self, ids_BT: torch.Tensor) -> None:
        self.to_model: Files = defaultdict(set)
        self.to_loss: Files = defaultdict(set)
        self._ids_BT = ids_BT
        self._answered = False

    def note(self, frame: FrameType, event: str, argument: Any) -> None:
        """A profile function: looks at the arguments of a call and at the value of a return."""
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(_PACKAGE):
            return
        values = _arguments(code, frame) if event == "call" else [argument]
        holds = self._is_supervision if self._answered else self._is_ids
        if any(_contains(value, holds) for value in values):
            files = self.to_loss if self._answered else self.to_model
            files[code.co_filename.removeprefix(_PACKAGE)].add(code.co_name)
        if event == "return" and isinstance(argument, TargetOutput) and not self._answered:
            self._answered = True
            self.note(frame, event, argument)

    def _is_ids(self, value: Any) -> bool:
        same = isinstance(value, torch.Tensor) and value.shape == self._ids_BT.shape
        return same and torch.equal(value, self._ids_BT)

    def _is_supervision(self, value: Any) -> bool:
        return isinstance(value, _SUPERVISION)


def _arguments(code: CodeType, frame: FrameType) -> list[Any]:
    variadic = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + variadic]
    return [frame.f_locals.get(name) for name in names]


def _contains(value: Any, holds: Callable[[Any], bool], depth: int = _DEPTH) -> bool:
    if holds(value):
        return True
    if depth == 0:
        return False
    inner: Any = ()
    if isinstance(value, list | tuple | set | frozenset):
        inner = value
    elif isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, _CARRIERS):
        inner = vars(value).values()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return any(_contains(one, holds, depth - 1) for one in inner)


@contextlib.contextmanager
def _recorded(journey: Journey) -> Iterator[None]:
    """Records this thread, threads that start meanwhile, and torch's RPC threads, at the fence."""

    def enter(handler: Any) -> Any:
        def entered(*arguments: Any) -> Any:
            sys.setprofile(journey.note)
            return handler(*arguments)

        return entered

    handlers = {name: getattr(fence._Fence, name) for name in ("deserialize", "run")}
    for name, handler in handlers.items():
        setattr(fence._Fence, name, enter(handler))
    threading.setprofile(journey.note)
    sys.setprofile(journey.note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        for name, handler in handlers.items():
            setattr(fence._Fence, name, handler)


def travel() -> tuple[Files, Files]:
    """One optimiser step on one batch in one process that calls itself over RPC: files to the model, to the loss."""
    torch.set_num_threads(1)
    config = dataclasses.replace(
        service_config("cpu", 1),
        topology=TopologyConfig(single=True),
        supervision=SupervisionConfig(prefetch=1),
    )
    draw = torch.Generator().manual_seed(0)
    chats = [
        Example(torch.randint(0, VOCAB_SIZE, (length,), generator=draw), torch.ones(length, dtype=torch.bool))
        for length in (24, 24)
    ]
    plan = BatchPlan(ChatDataset(chats, max_length=24), batch_size=2)
    journey = Journey(plan.batch(0).input_ids)
    world, stop = read_world(), threading.Event()
    cast = assign_roles(config.topology, world)
    devices = plan_devices(cast, world, target="cpu", trainer="cpu")
    shape = load_target_shape(config.target, cache_dir="unused")
    with (
        _recorded(journey),
        join_static(cast, world, config.rpc, devices, permissions(config.rpc, None)) as membership,
    ):
        server = load_server(config, ["cpu"])
        with TargetLifecycle(server=server, config=config.rpc, stop=stop).hosted():
            membership.mark("ready")
            backend = connect_target(config, shape, None, torch.device("cpu"), cast, membership, stop)
            backend.open_session(tiny_mapping())
            draft = make_draft(config, shape, backend, torch.device("cpu"))
            learner = Learner(draft, config.train, config.draft, TrainerGroup(), total_steps=1)
            with contextlib.closing(backend.stream(plan.batches())) as stream:
                learner.learn(itertools.islice(stream, 1))
            backend.close()
            membership.mark("done")
    return dict(journey.to_model), dict(journey.to_loss)
