"""What goes with targets of several processes, by the settings alone; who is who, and what each stage holds."""

import dataclasses

import pytest

from eagle_rpc.config.compose import load
from eagle_rpc.config.launch import num_workers
from eagle_rpc.config.schema import TopologyConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.process import read_world
from eagle_rpc.topology import Role, assign_elastic_roles, assign_roles

STAGED = "topology.stages_per_target=2"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["job=train", "topology.single=true"],
            "topology.single must be false with topology.stages_per_target=2, got true",
        ),
        (
            ["job=evaluate"],
            "topology.stages_per_target must be 1 with job=evaluate, which runs in one process, got 2",
        ),
        (
            ["job=regenerate"],
            "topology.stages_per_target must be 1 with job=regenerate and regenerate.backend=engine, which runs in "
            "one process, got 2",
        ),
        (
            ["job=serve", "rpc=elastic", "topology.first_stage=2"],
            "topology.first_stage must be below topology.stages_per_target 2, got 2",
        ),
        (
            ["job=train", "target.attention=flex_attention"],
            "target.attention must be another than flex_attention with topology.stages_per_target=2",
        ),
    ],
)
def test_what_runs_in_one_process_is_refused_in_a_sentence(overrides, message):
    with pytest.raises(ConfigError) as refused:
        load(*overrides, STAGED)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "job=train",
            "target.compile_shapes=[8x2048]",
            "topology.targets=2",
            "topology.devices_per_target=2",
        ],
        ["job=train", "data.packing=true"],
        ["job=serve", "rpc=elastic", "topology.first_stage=1"],
        ["job=plan"],
    ],
)
def test_compiled_layers_packing_and_several_devices_go_with_it(overrides):
    assert load(*overrides, STAGED).topology.stages_per_target == 2


def test_a_static_launch_counts_every_stage():
    assert num_workers(load("job=train", STAGED, "topology.targets=2", "topology.trainers=3")) == 7


def world_of(rank, size):
    return dataclasses.replace(read_world({}), rank=rank, size=size, local_rank=rank, local_size=size)


def test_stages_follow_their_target_and_trainers_come_last():
    topology = TopologyConfig(targets=2, trainers=1, stages_per_target=2)
    casts = [assign_roles(topology, world_of(rank, 5)) for rank in range(5)]
    names = ("target0", "target0.1", "target1", "target1.1", "trainer0")
    assert tuple(cast.me.name for cast in casts) == casts[0].names == names
    assert casts[0].target_names == ("target0", "target1")
    assert [cast.me.has(Role.stage) for cast in casts] == [False, True, False, True, False]


def test_too_few_workers_are_refused_with_the_number_of_stages():
    with pytest.raises(ConfigError, match="with 1 targets of 3 stages and 1 trainers needs 4 workers, got 2"):
        assign_roles(TopologyConfig(stages_per_target=3), world_of(0, 2))


def test_an_elastic_launch_serves_some_stages_or_all():
    topology = TopologyConfig(stages_per_target=3, first_target=2, first_stage=1)
    names = [assign_elastic_roles(Role.target, topology, world_of(rank, 3)).me.name for rank in range(3)]
    assert names == ["target2.1", "target2.2", "target3"]
