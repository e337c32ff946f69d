"""Trainers and a target over real RPC: supervision arrives while trainers stand in a collective, and has the same
bits from a target over several devices.
"""

from dataclasses import replace

import pytest
from support.service_training import service_config, take_part
from support.workers import run_workers

from eagle_rpc.config.choices import Sharding

pytestmark = pytest.mark.rpc


@pytest.mark.parametrize(
    "sharding",
    [pytest.param(Sharding.none, marks=pytest.mark.slow), Sharding.state],
    ids=lambda one: one.name,
)
def test_supervision_arrives_while_another_trainer_is_waited_for_in_a_collective(sharding: Sharding):
    _, first, second = run_workers(take_part, 3, service_config("cpu", trainers=2, sharding=sharding), 4)
    assert first["digest"] == second["digest"]


def test_a_target_over_several_devices_trains_the_same_weights():
    config = service_config("cpu", trainers=1)
    _, trained = run_workers(take_part, 2, config, 3)
    spread = replace(config, topology=replace(config.topology, devices_per_target=3))
    _, over_devices = run_workers(take_part, 2, spread, 3)
    assert over_devices["digest"] == trained["digest"]
