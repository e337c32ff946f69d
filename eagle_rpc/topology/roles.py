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
    stage = "stage"  # of a target, behind its first stage
    trainer = "trainer"


@dataclass(frozen=True, slots=True)
class Worker:
    """One process of a job. With `topology.single` it has both roles."""

    name: str
    roles: frozenset[Role]
    index: int  # among the workers of its role; of a stage that of its target
    stage: int = 0  # number of a stage; that of a target is 0

    def has(self, role: Role) -> bool:
        return role in self.roles


@dataclass(frozen=True, slots=True)
class Cast:
    """All workers of a static job, or the workers of one elastic launch, which have one role."""

    me: Worker
    target_names: tuple[str, ...]
    trainer_names: tuple[str, ...]
    stages_per_target: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """All workers, each target followed by its further stages, then trainers; each once."""
        units = (name for target in self.target_names for name in (target, *self.stages_of(target)))
        return tuple(dict.fromkeys((*units, *self.trainer_names)))

    def stages_of(self, target: str) -> tuple[str, ...]:
        """The names of a target's stages behind the first one."""
        return tuple(stage_name(target, number) for number in range(1, self.stages_per_target))


def stage_name(target: str, number: int) -> str:
    """The first stage has the target's name, which is the only one that trainers know."""
    return f"{target}.{number}" if number else target


SINGLE_NAME = "single0"


def assign_roles(topology: TopologyConfig, world: World) -> Cast:
    """The cast of a static job. Raises `ConfigError` if the workers do not fit the topology."""
    if topology.single:
        if world.size != 1:
            raise ConfigError(f"topology.single needs exactly 1 worker, got {world.size}")
        me = Worker(SINGLE_NAME, frozenset([Role.target, Role.trainer]), 0)
        return Cast(me, (SINGLE_NAME,), (SINGLE_NAME,))
    stages = topology.stages_per_target
    expected = topology.targets * stages + topology.trainers
    if world.size != expected:
        of_stages = f" of {stages} stages" if stages > 1 else ""
        rule = f"topology with {topology.targets} targets{of_stages} and {topology.trainers} trainers needs {expected}"
        command = f"torchrun --nproc-per-node={expected} -m eagle_rpc"
        raise ConfigError(f"{rule} workers, got {world.size}: start it with {command}")
    if world.num_agents > 1 and world.max_restarts > 0:
        rule = "torchrun --max-restarts must be 0 with several agents in a static job"
        found = f"got {world.max_restarts} with {world.num_agents} agents"
        raise ConfigError(f"{rule}, since their restart counts can differ, {found}")
    role, index = _role_and_index(topology, world)
    me = Worker(f"trainer{index}", frozenset([role]), index)
    return Cast(
        me if role is Role.trainer else _stage_worker(index, stages),
        tuple(f"target{i}" for i in range(topology.targets)),
        tuple(f"trainer{i}" for i in range(topology.trainers)),
        stages,
    )


def _stage_worker(place: int, stages_per_target: int) -> Worker:
    """The worker at a place among all stages of all targets."""
    target, stage = divmod(place, stages_per_target)
    role = Role.stage if stage else Role.target
    return Worker(stage_name(f"target{target}", stage), frozenset([role]), target, stage)


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
    """The cast of one elastic launch: trainers, or targets from `topology.first_target` on and their stages.

    Of targets with several stages the first worker is `topology.first_stage`; the others follow in order.
    """
    if role is Role.trainer:
        names = tuple(f"trainer{rank}" for rank in range(world.size))
        return Cast(Worker(names[world.rank], frozenset([role]), world.rank), (), names)
    stages = topology.stages_per_target
    start = topology.first_target * stages + topology.first_stage
    workers = [_stage_worker(start + rank, stages) for rank in range(world.size)]
    targets = tuple(dict.fromkeys(f"target{worker.index}" for worker in workers))
    return Cast(workers[world.rank], targets, (), stages)


def _role_and_index(topology: TopologyConfig, world: World) -> tuple[Role, int]:
    """Target or trainer, and the place among the trainers or among all stages of all targets."""
    num_stages = topology.targets * topology.stages_per_target
    if world.role_name == "default":
        if world.num_agents > 1:
            rule = "torchrun --role must be target or trainer with several agents"
            why = "since ranks depend on their order of arrival"
            raise ConfigError(f"{rule}, {why}, got {world.num_agents} agents without it")
        if world.rank < num_stages:
            return Role.target, world.rank
        return Role.trainer, world.rank - num_stages
    try:
        role = {one.name: one for one in (Role.target, Role.trainer)}[world.role_name]
    except KeyError:
        raise ConfigError(f"torchrun --role must be target or trainer, got {world.role_name!r}") from None
    expected = num_stages if role is Role.target else topology.trainers
    if world.role_size != expected:
        rule = f"topology needs {expected} workers with --role {role.value}"
        raise ConfigError(f"{rule}, got {world.role_size}")
    return role, world.role_rank
