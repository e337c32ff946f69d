"""GPUs of targets that are spread over several, and of the trainers beside them."""

import dataclasses

import pytest

from eagle_rpc.config.schema import TopologyConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.process import read_world
from eagle_rpc.topology import assign_roles, plan_devices, resolve_devices

AUTO = {"target": "auto", "trainer": "auto"}


def plans_of(topology, *, num_gpus, **settings):
    """The plan of each worker of a static job on one host, by name."""
    size = topology.targets + topology.trainers
    plans = {}
    for rank in range(size):
        world = dataclasses.replace(read_world({}), rank=rank, size=size, local_rank=rank, local_size=size)
        cast = assign_roles(topology, world)
        plans[cast.me.name] = plan_devices(
            cast,
            world,
            **{**AUTO, **settings},
            devices_per_target=topology.devices_per_target,
            num_gpus=num_gpus,
        )
    return plans


def test_targets_take_their_gpus_one_after_the_other_and_trainers_the_next_ones():
    topology = TopologyConfig(targets=2, trainers=2, devices_per_target=3)
    plans = plans_of(topology, num_gpus=8)
    assert {name: plan.devices for name, plan in plans.items()} == {
        "target0": ("cuda:0", "cuda:1", "cuda:2"),
        "target1": ("cuda:3", "cuda:4", "cuda:5"),
        "trainer0": ("cuda:6",),
        "trainer1": ("cuda:7",),
    }


def test_supervision_goes_from_a_targets_last_gpu():
    plans = plans_of(TopologyConfig(targets=2, trainers=1, devices_per_target=2), num_gpus=5)
    assert plans["trainer0"].device_maps == {
        "target0": {"cuda:4": "cuda:1"},
        "target1": {"cuda:4": "cuda:3"},
    }
    assert plans["target1"].device == "cuda:3"
    assert plans["target1"].device_maps == {"trainer0": {"cuda:3": "cuda:4"}}


def test_too_few_gpus_are_refused_with_the_numbers():
    rule = (
        r"topology\.devices_per_target=2 needs 6 GPUs for 2 targets and 2 trainers unless train\.device names "
        "one, got 5"
    )
    with pytest.raises(ConfigError, match=rule):
        plans_of(TopologyConfig(targets=2, trainers=2, devices_per_target=2), num_gpus=5)


def test_a_trainer_may_share_a_gpu_that_it_names():
    plans = plans_of(TopologyConfig(devices_per_target=2), num_gpus=2, trainer="cuda:0")
    assert plans["target0"].devices == ("cuda:0", "cuda:1")
    assert plans["trainer0"].devices == ("cuda:0",) and plans["trainer0"].device_maps == {}


@pytest.mark.parametrize(
    ("setting", "local_rank", "num_gpus", "needs"),
    [("auto", 1, 3, "GPUs 2 to 3"), ("cuda:3", 0, 4, "GPUs 3 to 4"), ("cuda", 0, 1, "GPUs 0 to 1")],
)
def test_more_gpus_than_the_host_has_are_refused_by_number(setting, local_rank, num_gpus, needs):
    rule = rf"topology\.devices_per_target=2 needs {needs} of this host for target {local_rank}, which has {num_gpus}"
    with pytest.raises(ConfigError, match=rule):
        resolve_devices(setting, 2, local_rank=local_rank, num_gpus=num_gpus)


def test_a_named_gpu_is_the_first_of_a_target():
    assert resolve_devices("cuda:1", 2, num_gpus=4) == ("cuda:1", "cuda:2")


@pytest.mark.parametrize(("setting", "num_gpus"), [("cpu", 8), ("auto", 0)])
def test_without_gpus_the_layers_are_spread_over_one_cpu(setting, num_gpus):
    assert resolve_devices(setting, 3, num_gpus=num_gpus) == ("cpu", "cpu", "cpu")


def test_workers_of_other_agents_do_not_count():
    topology = TopologyConfig(trainers=2, devices_per_target=2)
    world = dataclasses.replace(
        read_world({}),
        rank=2,
        size=3,
        local_rank=1,
        local_size=2,
        num_agents=2,
        role_name="trainer",
        role_rank=1,
        role_size=2,
    )
    plan = plan_devices(assign_roles(topology, world), world, **AUTO, devices_per_target=2, num_gpus=2)
    assert plan.devices == ("cuda:1",) and plan.device_maps == {}
