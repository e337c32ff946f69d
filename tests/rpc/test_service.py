"""Targets and trainers in processes of their own, over TensorPipe, in one static world."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_target import tensors_of, tiny_batch, tiny_mapping, tiny_target_config
from support.workers import TEST_RPC, run_workers

from eagle_rpc.client import ClientSettings, RemoteEagle3TargetModel
from eagle_rpc.config.schema import RpcConfig, TopologyConfig
from eagle_rpc.errors import EagleRpcError, InvalidRequest, TargetFailed, TargetMismatch, TargetUnavailable
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.process import read_world
from eagle_rpc.rpc import Link, StaticMembership, host, join_static
from eagle_rpc.service.endpoint import CONTROL_METHODS, TargetEndpoint
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import ENCODINGS, SessionSettings, TargetExpectation
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.topology import DevicePlan, Role, assign_roles

pytestmark = pytest.mark.rpc


@contextlib.contextmanager
def joined(topology: TopologyConfig, rpc: RpcConfig = TEST_RPC) -> Iterator[StaticMembership]:
    torch.set_num_threads(1)
    world = read_world()
    with join_static(
        assign_roles(topology, world), world, rpc, DevicePlan("cpu", {}), permissions(rpc, None)
    ) as membership:
        yield membership


def make_target(seed: int = 0) -> HFEagle3TargetModel:
    return HFEagle3TargetModel.load(tiny_target_config(), "cpu", cache_dir="unused", seed=seed)


def serve(membership: StaticMembership, target: Any, **limits: Any) -> dict[str, int]:
    """A target's life; returns the server's counts."""
    server = TargetModelServer(target, tiny_target_config(**limits))
    host(TargetEndpoint(server), CONTROL_METHODS)
    membership.mark("ready")
    membership.wait_for(membership.cast.trainer_names, "done", timeout=60)
    server.close()
    return server.throughput.requests


def remote_target(
    membership: StaticMembership,
    *,
    encoding: str = "hidden",
    expected: TargetExpectation | None = None,
    **changes: Any,
) -> RemoteEagle3TargetModel:
    membership.wait_for(membership.cast.target_names, "ready", timeout=60)
    settings: dict[str, Any] = {
        "session": SessionSettings(encoding=encoding, run="test", trainer=membership.cast.me.name),
        "index": membership.cast.me.index,
        "prefetch": 3,
        "request_timeout": 30.0,
        "reconnect_deadline": 30.0,
        "heartbeat_interval": 1.0,
        "heartbeat_misses": 10,
    }
    return RemoteEagle3TargetModel(
        membership,
        settings=ClientSettings(**{**settings, **changes}),
        expected=expected or TargetExpectation(),
        device=torch.device("cpu"),
        stop=threading.Event(),
    )


def as_lists(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    # Compared bit for bit: fp32 survives the way through Python floats.
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def colocated_batches(encoding: str, count: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    backend = ColocatedEagle3TargetModel(
        make_target(), tiny_target_config(), SessionSettings(encoding=encoding, rows="position_mask")
    )
    backend.open_session(tiny_mapping())
    return [
        as_lists(tensors_of(batch)) for batch in backend.stream(tiny_batch(seed) for seed in range(count))
    ]


def stream_everything(topology: TopologyConfig) -> Any:
    with joined(topology) as membership:
        if membership.cast.me.has(Role.target) and not topology.single:
            return serve(membership, make_target())
        server = None
        if topology.single:
            server = TargetModelServer(make_target(), tiny_target_config())
            host(TargetEndpoint(server), CONTROL_METHODS)
            membership.mark("ready")
        received = {}
        for encoding in ENCODINGS:
            backend = remote_target(membership, encoding=encoding)
            backend.open_session(tiny_mapping())
            received[encoding] = [
                as_lists(tensors_of(batch)) for batch in backend.stream(tiny_batch(seed) for seed in range(7))
            ]
            backend.close()
        membership.mark("done")
        if server is not None:
            server.close()
        return received


@pytest.mark.parametrize(
    "topology",
    [
        TopologyConfig(single=True),
        TopologyConfig(),
        TopologyConfig(targets=1, trainers=2),
        TopologyConfig(targets=2, trainers=1),
    ],
    ids=["single", "1x1", "1x2", "2x1"],
)
def test_remote_supervision_equals_co_located_bit_for_bit_and_in_order(topology: TopologyConfig):
    size = 1 if topology.single else topology.targets + topology.trainers
    results = run_workers(stream_everything, size, topology)
    expected = {encoding: colocated_batches(encoding, 7) for encoding in ENCODINGS}
    for received in results[0 if topology.single else topology.targets :]:
        assert received == expected
    if topology.targets == 2:
        assert all(requests["ok"] > 0 for requests in results[:2]), "every replica takes its share"


def refusals() -> Any:
    with joined(TopologyConfig()) as membership:
        if membership.cast.me.has(Role.target):
            return serve(membership, make_target())
        backend = remote_target(membership)
        backend.open_session(tiny_mapping())
        seen = []
        bad = tiny_batch(0)
        for change in (
            {"input_ids": bad.input_ids + 1000},
            {"loss_mask": bad.loss_mask * 7},
            {"attention_mask": bad.attention_mask.flip(1)},
            {"input_ids": bad.input_ids.float()},
        ):
            tokens = dataclasses.replace(bad, **change)
            try:
                backend.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask)
            except InvalidRequest as error:
                seen.append(str(error))
        good = backend.generate_batch(bad.input_ids, bad.attention_mask, bad.loss_mask)
        backend.close()
        membership.mark("done")
        return seen, as_lists(tensors_of(good))


def test_refusals_reach_the_trainer_with_field_and_value_and_the_target_lives_on():
    seen, good = run_workers(refusals, 2)[1]
    for text, field in zip(seen, ("input_ids", "loss_mask", "attention_mask", "input_ids"), strict=True):
        assert text.startswith("target0: ") and field in text
    assert good == colocated_batches("hidden", 1)[0]


def mismatches() -> Any:
    with joined(TopologyConfig(targets=2, trainers=1)) as membership:
        if membership.cast.me.has(Role.target):
            return serve(membership, make_target(seed=membership.cast.me.index))
        seen = []
        for expected in (TargetExpectation(hidden_size=999), TargetExpectation()):
            try:
                remote_target(membership, expected=expected)
            except TargetMismatch as error:
                seen.append(str(error))
        membership.mark("done")
        return seen


def test_a_foreign_target_and_replicas_of_different_weights_are_refused():
    foreign, mixed = run_workers(mismatches, 3)[2]
    assert "hidden_size must be 999, the target has 32" in foreign
    assert "must serve the same model as the other targets" in mixed


def crowded() -> Any:
    with joined(TopologyConfig()) as membership:
        if membership.cast.me.has(Role.target):
            return serve(membership, make_target(), max_queued_requests=1)
        backend = remote_target(membership, prefetch=8)
        backend.open_session(tiny_mapping())
        received = [
            as_lists(tensors_of(batch)) for batch in backend.stream(tiny_batch(seed) for seed in range(20))
        ]
        membership.mark("done")
        return received


def test_a_busy_target_is_asked_again_and_nothing_is_lost_or_reordered():
    assert run_workers(crowded, 2)[1] == colocated_batches("hidden", 20)


class StuckTarget:
    """Answers after its gate opens."""

    def __init__(self, gate: threading.Event) -> None:
        self._target = make_target()
        self._gate = gate

    def get_input_embeddings(self) -> Any:
        return self._target.get_input_embeddings()

    def generate_batch(self, *args: Any, **packing: Any) -> Any:
        self._gate.wait(60)
        return self._target.generate_batch(*args, **packing)


def time_outs() -> Any:
    with joined(TopologyConfig()) as membership:
        if membership.cast.me.has(Role.target):
            gate = threading.Event()
            membership.mark("loaded")
            opener = threading.Thread(
                target=lambda: (membership.wait_for(("trainer0",), "gave_up", timeout=60), gate.set())
            )
            opener.start()
            return serve(membership, StuckTarget(gate))
        backend = remote_target(membership, encoding="logits", request_timeout=2)
        backend.open_session(tiny_mapping())
        tokens = tiny_batch(0)
        try:
            backend.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask)
        except EagleRpcError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            membership.mark("gave_up")
            membership.mark("done")


def test_a_stuck_target_is_given_up_within_the_time_out_and_named():
    assert run_workers(time_outs, 2)[1].startswith(
        "RequestExpired: request trainer0-0 was given up after 6.0 s, at last because: target0"
    )


class DyingTarget(StuckTarget):
    """Its process ends in the middle of a forward pass."""

    def generate_batch(self, *args: Any, **packing: Any) -> Any:
        os._exit(1)


def deaths(seen: str) -> None:
    with joined(TopologyConfig()) as membership:
        if membership.cast.me.has(Role.target):
            serve(membership, DyingTarget(threading.Event()))
        backend = remote_target(membership, encoding="logits")
        backend.open_session(tiny_mapping())
        try:
            list(backend.stream([tiny_batch(0)]))
        except TargetUnavailable as error:
            Path(seen).write_text(str(error))
            raise


def test_a_target_that_dies_in_a_forward_is_a_lost_connection_that_a_static_world_does_not_wait_for(
    tmp_path: Path,
):
    seen = tmp_path / "seen"
    with pytest.raises(AssertionError, match=r"died with exit code 1|TargetUnavailable"):
        run_workers(deaths, 2, str(seen))
    assert "lost the connection to target0 during request trainer0-0" in seen.read_text()


def absent_service() -> Any:
    with joined(TopologyConfig(single=True)) as membership:
        me = membership.cast.me.name
        try:
            link = Link(peer=me, incarnation="", data_name=me, control_name=me, between_gpus=False)
            link.use_rref(5)
        except TargetFailed as error:
            return str(error)


def test_asking_a_peer_that_hosts_no_service_names_it():
    assert run_workers(absent_service, 1)[0] == "single0 hosts no service"
