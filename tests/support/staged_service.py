"""A target of several stages and its trainer in processes of one static job."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from support.elastic import HEARTBEATS, Link, Worker
from support.processes import free_port, torchrun_environment
from support.supervised_batches import colocated, supervision_of
from support.tiny_target import tensors_of, tiny_batch, tiny_mapping, tiny_target_config
from support.workers import TEST_RPC

from eagle_rpc.client import RemoteEagle3TargetModel
from eagle_rpc.config import Config
from eagle_rpc.config.choices import MembershipKind
from eagle_rpc.config.schema import RpcConfig, RunConfig, TargetConfig, TopologyConfig, TrainConfig
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.jobs.assembly import client_settings
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.jobs.serve import elastic_stage, elastic_target
from eagle_rpc.jobs.stages import hand_over_bytes
from eagle_rpc.jobs.train import DONE, READY, job_devices, serve_until_done
from eagle_rpc.process import read_world
from eagle_rpc.rpc import join_static
from eagle_rpc.supervision import SessionSettings, TargetExpectation, TokenBatch
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.topology import Role, assign_elastic_roles, assign_roles

_SECONDS = 120.0
ENCODINGS = ("hidden", "logits", "probs")


def staged_config(target: TargetConfig, num_stages: int) -> Config:
    return Config(
        run=RunConfig(name="test", dir="unused", cache_dir="unused"),
        topology=TopologyConfig(targets=1, trainers=1, stages_per_target=num_stages),
        rpc=TEST_RPC,
        target=target,
        train=TrainConfig(device="cpu"),
    )


def batches() -> list[TokenBatch]:
    """Plain ones and a packed one."""
    plain = [tiny_batch(seed) for seed in range(3)]
    segments = (torch.arange(plain[0].shape[1])[None] >= 3).long().expand(plain[0].shape[0], -1)
    return [*plain, dataclasses.replace(plain[0], segment_ids=segments.contiguous())]


def run_job(config: Config) -> Any:
    """What the trainer of a job sends back; all its processes end with code 0."""
    size = config.topology.targets * config.topology.stages_per_target + config.topology.trainers
    port = free_port()
    workers = [Worker(_work, rank, size, port, config) for rank in range(size)]
    try:
        answer = workers[-1].receive(_SECONDS)
        for worker in workers:
            worker.process.join(_SECONDS)
        assert [worker.process.exitcode for worker in workers] == [0] * size
        return answer
    finally:
        for worker in workers:
            worker.end()


def _work(
    link: Link, rank: int, size: int, port: int, config: Config, train: Callable[..., Any] | None = None
) -> None:
    os.environ.update(torchrun_environment(rank, size, port))
    answer = take_part(config, link, train or _ask_all)
    if answer is not None:
        link.send(answer)


def take_part(config: Config, link: Link, train: Callable[..., Any]) -> Any:
    """One process: a stage, or the trainer, which returns what `train` does."""
    world = read_world()
    cast = assign_roles(config.topology, world)
    devices = job_devices(config, cast, world)
    permitted = permissions(config.rpc, None, hand_over_bytes=hand_over_bytes(config))
    with join_static(cast, world, config.rpc, devices, permitted) as membership:
        if not cast.me.has(Role.trainer):
            serve_until_done(config, devices.devices, membership, threading.Event())
            return None
        membership.wait_for(cast.target_names, READY, timeout=_SECONDS)
        answer = train(config, membership, cast.me, link)
        membership.mark(DONE)
        return answer


def lose_a_stage(config: Config) -> tuple[str, str]:
    """Kills the last stage while the trainer streams; the errors that trainer and target end with."""
    size, port = config.topology.stages_per_target + 1, free_port()
    workers = [Worker(_work, rank, size, port, config, _stream_until_lost) for rank in range(size)]
    try:
        assert workers[-1].receive(_SECONDS) == "streaming"
        workers[-2].end()
        error = workers[-1].receive(_SECONDS)
        try:
            workers[0].receive(_SECONDS)
        except AssertionError as raised:
            return error, str(raised)
        raise AssertionError("the target goes on without its stage")
    finally:
        for worker in workers:
            worker.end()


def _stream_until_lost(config: Config, membership: Any, me: Any, link: Link) -> None:
    with connected(config, membership, me, "hidden") as backend:
        backend.open_session(tiny_mapping())
        try:
            for number, _ in enumerate(backend.stream(map(tiny_batch, range(10**6)))):
                if number == 3:
                    link.send("streaming")
        except EagleRpcError as error:
            link.send(f"{type(error).__name__}: {error}")
            raise
    raise AssertionError("the trainer goes on without its target")


def _ask_all(config: Config, membership: Any, me: Any, link: Link) -> Any:
    return [ask(config, membership, me, encoding) for encoding in ENCODINGS]


@contextlib.contextmanager
def connected(config: Config, membership: Any, me: Any, encoding: str) -> Iterator[RemoteEagle3TargetModel]:
    settings = dataclasses.replace(
        client_settings(config, me), session=SessionSettings(encoding=encoding, run="test", trainer=me.name)
    )
    backend = RemoteEagle3TargetModel(
        membership,
        settings=settings,
        expected=TargetExpectation(),
        device=torch.device("cpu"),
        stop=threading.Event(),
    )
    with contextlib.closing(backend):
        yield backend


def ask(config: Config, membership: Any, me: Any, encoding: str) -> tuple[list[dict[str, Any]], Any]:
    with connected(config, membership, me, encoding) as backend:
        backend.open_session(tiny_mapping())
        made = [tensors_of(batch) for batch in backend.stream(iter(batches()))]
        info = dataclasses.replace(backend.model_info(), incarnation="")
    return [{name: as_numpy(tensor) for name, tensor in one.items()} for one in made], info


def assert_bits_of_one_process(answers: Any, target: HFEagle3TargetModel, config: TargetConfig) -> None:
    """What the trainer of `run_job` got of the stages is what the whole `target` gives here."""
    for encoding, (made, info) in zip(ENCODINGS, answers, strict=True):
        alone = colocated(target, config, tiny_mapping(), encoding, SessionSettings().rows)
        assert info == dataclasses.replace(alone.model_info(), incarnation="")
        for found, tokens in zip(made, batches(), strict=True):
            for name, tensor in tensors_of(supervision_of(alone, tokens)).items():
                assert np.array_equal(found[name], as_numpy(tensor)), (encoding, name)


def as_numpy(tensor: torch.Tensor) -> Any:
    """NumPy has no bfloat16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


# --- an elastic service


def elastic_config(num_stages: int, address: str, token_file: str) -> Config:
    return Config(
        run=RunConfig(name="test", dir="unused", cache_dir="unused"),
        topology=TopologyConfig(stages_per_target=num_stages),
        rpc=RpcConfig(
            membership=MembershipKind.elastic,
            registry=address,
            token_file=token_file,
            start_timeout=_SECONDS,
            model_timeout=_SECONDS,
            request_timeout=20.0,
            shutdown_timeout=20.0,
            **HEARTBEATS,
        ),
        target=tiny_target_config(),
    )


def serve_stage(link: Link, target: int, stage: int, config: Config) -> None:
    """One stage of one target, until it is killed or told to end; says when it serves."""
    stop = threading.Event()
    topology = dataclasses.replace(config.topology, first_target=target, first_stage=stage)
    config = dataclasses.replace(config, topology=topology)
    me = assign_elastic_roles(Role.target, topology, read_world({})).me
    threading.Thread(target=lambda: (link.receive_forever(), stop.set()), daemon=True).start()
    if me.has(Role.target):
        with elastic_target(config, me.name, ["cpu"], stop, hosts_registry=False) as life, life.hosted():
            link.send(life.server.model_info())
            life.wait()
        return
    with elastic_stage(config, me, ["cpu"], stop, hosts_registry=False) as stage_life:
        stage_life.run()
