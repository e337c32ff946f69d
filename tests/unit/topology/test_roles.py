import dataclasses

import pytest

from eagle_rpc.config.choices import JobName, MembershipKind
from eagle_rpc.config.schema import Config, JobConfig, RpcConfig, TopologyConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.process import World, read_world
from eagle_rpc.topology import Role, assign_roles, carries, plan_devices, worker_name

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "3",
    "ROLE_NAME": "default",
    "ROLE_RANK": "1",
    "ROLE_WORLD_SIZE": "3",
    "GROUP_WORLD_SIZE": "1",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def world(**changes: object) -> World:
    return dataclasses.replace(read_world(TORCHRUN), max_restarts=0, **changes)


def test_a_process_started_by_hand_is_a_world_of_one():
    alone = read_world({})
    assert (alone.rank, alone.size, alone.launched) == (0, 1, False)


def test_torchruns_variables_are_read():
    seen = read_world(TORCHRUN)
    assert (seen.rank, seen.size, seen.restart_count, seen.master_port, seen.launched) == (
        1,
        3,
        2,
        29500,
        True,
    )


def test_an_incomplete_environment_names_what_is_missing():
    with pytest.raises(ConfigError, match="ROLE_NAME"):
        read_world({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})


@pytest.mark.parametrize(("rank", "name"), [(0, "target0"), (1, "target1"), (2, "trainer0"), (3, "trainer1")])
def test_plain_torchrun_gives_the_first_ranks_to_targets(rank: int, name: str):
    cast = assign_roles(TopologyConfig(targets=2, trainers=2), world(rank=rank, size=4))
    assert cast.me.name == name
    assert cast.names == ("target0", "target1", "trainer0", "trainer1")


def test_with_role_names_the_rank_order_does_not_matter():
    last = world(rank=2, size=3, role_name="target", role_rank=0, role_size=1)
    assert assign_roles(TopologyConfig(targets=1, trainers=2), last).me.name == "target0"
    first = world(rank=0, size=3, role_name="trainer", role_rank=1, role_size=2)
    assert assign_roles(TopologyConfig(targets=1, trainers=2), first).me.name == "trainer1"


@pytest.mark.parametrize(
    ("job", "membership", "name"),
    [("train", "static", "target0"), ("train", "elastic", "trainer0"), ("serve", "elastic", "target0")],
)
def test_the_first_worker_has_the_name_of_its_role(job: str, membership: str, name: str):
    config = Config(job=JobConfig(name=JobName(job)), rpc=RpcConfig(membership=MembershipKind(membership)))
    assert worker_name(config, world(rank=0, size=2)) == name


def test_a_job_without_roles_has_its_own_name():
    assert worker_name(Config(job=JobConfig(name=JobName.export)), read_world({})) == "export"


def test_single_is_both_roles():
    me = assign_roles(TopologyConfig(single=True), read_world({})).me
    assert me.has(Role.target) and me.has(Role.trainer)


@pytest.mark.parametrize(
    ("topology", "changes", "message"),
    [
        (TopologyConfig(targets=1, trainers=1), {"size": 3}, "needs 2 workers, got 3"),
        (TopologyConfig(single=True), {"size": 2}, "exactly 1 worker, got 2"),
        (TopologyConfig(targets=1, trainers=2), {"role_name": "teacher"}, "'teacher'"),
        (
            TopologyConfig(targets=1, trainers=2),
            {"role_name": "target", "role_size": 2},
            "needs 1 workers with --role target, got 2",
        ),
        (TopologyConfig(targets=1, trainers=2), {"num_agents": 2, "max_restarts": 1}, "got 1 with 2 agents"),
        (
            TopologyConfig(targets=1, trainers=2),
            {"num_agents": 2},
            "with several agents.*got 2 agents without it",
        ),
    ],
)
def test_workers_that_do_not_fit_are_refused_with_the_numbers(
    topology: TopologyConfig, changes: dict[str, object], message: str
):
    with pytest.raises(ConfigError, match=message):
        assign_roles(
            topology, dataclasses.replace(read_world(TORCHRUN), **{"max_restarts": 0, "size": 3, **changes})
        )


AUTO = {"target": "auto", "trainer": "auto"}


def test_trainers_map_their_gpu_to_each_targets_gpu():
    here = world(rank=2, size=3, local_rank=2)
    cast = assign_roles(TopologyConfig(targets=2, trainers=1), here)
    plan = plan_devices(cast, here, **AUTO, num_gpus=3)
    assert plan.device == "cuda:2"
    assert plan.device_maps == {"target0": {"cuda:2": "cuda:0"}, "target1": {"cuda:2": "cuda:1"}}


@pytest.mark.parametrize(
    ("targets", "trainers", "num_gpus", "mapped"),
    [
        (1, 2, 3, {"target0"}),  # a GPU for each worker
        (1, 2, 2, set()),  # trainer1 computes on the target's GPU
        (2, 2, 3, {"target1"}),  # trainer1 computes on the GPU of target0
        (2, 1, 2, set()),  # target0 computes on the trainer's GPU
        (1, 1, 2, {"target0"}),
        (1, 1, 1, set()),
    ],
)
def test_tensors_go_through_host_memory_where_two_processes_compute_on_a_gpu(
    targets: int, trainers: int, num_gpus: int, mapped: set[str]
):
    size = targets + trainers
    here = world(rank=targets, size=size, local_rank=targets)
    cast = assign_roles(TopologyConfig(targets=targets, trainers=trainers), here)
    assert plan_devices(cast, here, **AUTO, num_gpus=num_gpus).device_maps.keys() == mapped
    for index in range(targets):
        there = world(rank=index, size=size, local_rank=index)
        cast = assign_roles(TopologyConfig(targets=targets, trainers=trainers), there)
        maps = plan_devices(cast, there, **AUTO, num_gpus=num_gpus).device_maps
        assert ("trainer0" in maps) is (f"target{index}" in mapped)


@pytest.mark.parametrize(
    ("one", "other", "workers", "carried"),
    [
        ("gpu1", "gpu0", [("gpu0", "gpu1"), ("gpu0",)], False),  # a trainer on the target's first GPU
        ("gpu1", "gpu2", [("gpu0", "gpu1"), ("gpu2",), ("gpu0",)], True),  # the others are elsewhere
        ("gpu1", "gpu2", [("gpu0", "gpu1"), ("gpu2",), ("gpu1",)], False),
        ("gpu0", "gpu0", [("gpu0",)], False),  # one process
        ("gpu0", "", [("gpu0",), ("",)], False),
        ("cpu", "cpu", [("cpu",), ("cpu",)], False),
    ],
)
def test_a_pair_of_gpus_carries_tensors_where_each_is_one_workers_alone(
    one: str, other: str, workers: list[tuple[str, ...]], carried: bool
):
    assert carries(one, other, workers) is carried


@pytest.mark.parametrize(
    ("target", "trainer", "plans"),
    [
        ("cuda:0", "cuda:0", [("cuda:0", {}), ("cuda:0", {})]),
        (
            "cuda:1",
            "cuda:0",
            [("cuda:1", {"trainer0": {"cuda:1": "cuda:0"}}), ("cuda:0", {"target0": {"cuda:0": "cuda:1"}})],
        ),
        ("cpu", "auto", [("cpu", {}), ("cuda:1", {})]),
        ("cuda", "cpu", [("cuda:0", {}), ("cpu", {})]),
    ],
)
def test_both_ends_map_the_devices_that_the_configuration_names(
    target: str, trainer: str, plans: list[tuple[str, dict[str, dict[str, str]]]]
):
    for rank, (device, maps) in enumerate(plans):
        here = world(rank=rank, size=2, local_rank=rank)
        plan = plan_devices(
            assign_roles(TopologyConfig(), here), here, target=target, trainer=trainer, num_gpus=2
        )
        assert (plan.device, plan.device_maps) == (device, maps)


def test_one_process_hands_itself_tensors_through_host_memory():
    here = read_world({})
    cast = assign_roles(TopologyConfig(single=True), here)
    assert plan_devices(cast, here, **AUTO, num_gpus=1).device_maps == {}


def test_without_gpus_everything_is_on_the_cpu():
    here = world(rank=1, size=2)
    plan = plan_devices(assign_roles(TopologyConfig(), here), here, **AUTO, num_gpus=0)
    assert (plan.device, plan.device_maps) == ("cpu", {})


def test_nothing_is_mapped_to_peers_of_other_agents():
    here = world(rank=1, size=2, local_rank=0, num_agents=2, role_name="trainer", role_rank=0, role_size=1)
    cast = assign_roles(TopologyConfig(), here)
    plan = plan_devices(cast, here, **AUTO, num_gpus=1)
    assert (plan.device, plan.device_maps) == ("cuda:0", {})


@pytest.mark.parametrize(("setting", "num_gpus"), [("cuda:3", 2), ("cuda", 0), ("cuda:0", 0)])
def test_a_gpu_that_is_not_there_is_refused_with_the_setting_that_names_it(setting: str, num_gpus: int):
    here = world(rank=1, size=2, local_rank=1)
    cast = assign_roles(TopologyConfig(), here)
    for field, devices in {
        "train.device": {"target": "cpu", "trainer": setting},
        "target.device": {"target": setting, "trainer": "cpu"},
    }.items():
        rule = f"{field} must be a device of this host, which has {num_gpus} GPUs, got {setting}"
        with pytest.raises(ConfigError, match=rule):
            plan_devices(cast, here, **devices, num_gpus=num_gpus)
