"""The role and the name of this process, from the topology and from torchrun's variables."""

from dataclasses import dataclass
from enum import Enum

from eagle_rpc.config.choices import JobName, MembershipKind
from eagle_rpc.config.schema import Config, TopologyConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.process.environment import World


class Role(Enum):
    """The work of a process."""

    target = "target"
    trainer = "trainer"


@dataclass(frozen=True, slots=True)
class Worker:
    """One process of a job. With `topology.single` it has both roles."""

    name: str
    roles: frozenset[Role]
    index: int  # among the workers of its role

    def has(self, role: Role) -> bool:
        return role in self.roles


@dataclass(frozen=True, slots=True)
class Cast:
    """All workers of a static job, or the workers of one elastic launch, which have one role."""

    me: Worker
    target_names: tuple[str, ...]
    trainer_names: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All workers, targets first, each once."""
        return tuple(dict.fromkeys(self.target_names + self.trainer_names))


SINGLE_NAME = "single0"


def assign_roles(topology: TopologyConfig, world: World) -> Cast:
    """The cast of a static job. Raises `ConfigError` if the workers do not fit the topology."""
    if topology.single:
        if world.size != 1:
            raise ConfigError(f"topology.single needs exactly 1 worker, got {world.size}")
        me = Worker(SINGLE_NAME, frozenset(Role), 0)
        return Cast(me, (SINGLE_NAME,), (SINGLE_NAME,))
    expected = topology.targets + topology.trainers
    if world.size != expected:
        rule = f"topology with {topology.targets} targets and {topology.trainers} trainers needs {expected}"
        command = f"torchrun --nproc-per-node={expected} -m eagle_rpc"
        raise ConfigError(f"{rule} workers, got {world.size}: start it with {command}")
    if world.num_agents > 1 and world.max_restarts > 0:
        rule = "torchrun --max-restarts must be 0 with several agents in a static job"
        found = f"got {world.max_restarts} with {world.num_agents} agents"
        raise ConfigError(f"{rule}, since their restart counts can differ, {found}")
    role, index = _role_and_index(topology, world)
    return Cast(
        Worker(f"{role.value}{index}", frozenset([role]), index),
        tuple(f"target{i}" for i in range(topology.targets)),
        tuple(f"trainer{i}" for i in range(topology.trainers)),
    )


def assign_trainers(config: Config, world: World) -> Cast:
    """The cast of `job=train`: of all workers if membership is static, of trainers alone if it is elastic."""
    if config.rpc.membership is MembershipKind.elastic:
        return assign_elastic_roles(Role.trainer, config.topology, world)
    return assign_roles(config.topology, world)


def worker_name(config: Config, world: World) -> str:
    """The name of this process in the log. Raises `ConfigError` if the workers do not fit the topology."""
    if config.job.name is JobName.train:
        return assign_trainers(config, world).me.name
    if config.job.name is JobName.serve:
        return assign_elastic_roles(Role.target, config.topology, world).me.name
    return config.job.name.value


def assign_elastic_roles(role: Role, topology: TopologyConfig, world: World) -> Cast:
    """The cast of one elastic launch: all have `role`. Targets count from `topology.first_target` on."""
    first = topology.first_target if role is Role.target else 0
    names = tuple(f"{role.value}{first + rank}" for rank in range(world.size))
    me = Worker(names[world.rank], frozenset([role]), first + world.rank)
    return Cast(me, names, ()) if role is Role.target else Cast(me, (), names)


def _role_and_index(topology: TopologyConfig, world: World) -> tuple[Role, int]:
    if world.role_name == "default":
        if world.num_agents > 1:
            rule = "torchrun --role must be target or trainer with several agents"
            why = "since ranks depend on their order of arrival"
            raise ConfigError(f"{rule}, {why}, got {world.num_agents} agents without it")
        if world.rank < topology.targets:
            return Role.target, world.rank
        return Role.trainer, world.rank - topology.targets
    try:
        role = Role[world.role_name]
    except KeyError:
        raise ConfigError(f"torchrun --role must be target or trainer, got {world.role_name!r}") from None
    expected = topology.targets if role is Role.target else topology.trainers
    if world.role_size != expected:
        rule = f"topology needs {expected} workers with --role {role.value}"
        raise ConfigError(f"{rule}, got {world.role_size}")
    return role, world.role_rank
