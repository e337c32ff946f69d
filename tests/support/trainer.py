"""Settings and connection of a trainer in an elastic service, for the worker programs of fault tests and benchmarks."""

import contextlib
import threading
from collections.abc import Iterator

import hydra
import torch

from eagle_rpc.client import RemoteEagle3TargetModel
from eagle_rpc.config import Config
from eagle_rpc.config.compose import conf_dir, register_schema, to_config
from eagle_rpc.jobs.assembly import connect_target
from eagle_rpc.jobs.elastic_worker import announced
from eagle_rpc.process import read_world
from eagle_rpc.process.startup import start_worker
from eagle_rpc.rpc import ElasticMembership
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.topology import Role, assign_elastic_roles


def compose(overrides: list[str]) -> Config:
    """The settings of `python -m eagle_rpc OVERRIDES`."""
    register_schema()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(hydra.compose("config", overrides))


@contextlib.contextmanager
def elastic_trainer(config: Config) -> Iterator[tuple[ElasticMembership, RemoteEagle3TargetModel]]:
    """Announces this process as a trainer on the CPU and connects it with the targets. It never loads a tokenizer."""
    stop, device = threading.Event(), torch.device("cpu")
    cast = assign_elastic_roles(Role.trainer, config.topology, read_world())
    name = cast.me.name
    start_worker(config, name)
    shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
    with announced(config, name, Role.trainer, device, stop, when_superseded=stop.set) as membership:
        target = connect_target(config, shape, None, device, cast, membership, stop)
        with contextlib.closing(target):
            yield membership, target
