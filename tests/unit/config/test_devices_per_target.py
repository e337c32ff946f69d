"""What goes with targets over several GPUs, by the settings alone."""

import pytest

from eagle_rpc.config.compose import load
from eagle_rpc.errors import ConfigError

SPREAD = "topology.devices_per_target=2"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["job=train", "topology.single=true"],
            "topology.single must be false with topology.devices_per_target=2, got true",
        ),
        (
            ["job=evaluate"],
            "topology.devices_per_target must be 1 with job=evaluate, which runs on one device, got 2",
        ),
        (
            ["job=verify"],
            "topology.devices_per_target must be 1 with job=verify, which runs on one device, got 2",
        ),
        (
            ["job=regenerate"],
            "topology.devices_per_target must be 1 with job=regenerate and regenerate.backend=engine, which runs "
            "on one device, got 2",
        ),
        (
            ["job=train", "target.attention=flex_attention"],
            "target.attention must be another than flex_attention with topology.devices_per_target=2, since its "
            "masks stay on one device, got flex_attention",
        ),
    ],
)
def test_what_runs_on_one_device_is_refused_in_a_sentence(overrides, message):
    with pytest.raises(ConfigError) as refused:
        load(*overrides, SPREAD)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["job=train", "target.compile_shapes=[8x2048]", "topology.targets=2"],
        ["job=train", "target.quantization=int8_weights"],
        ["job=serve", "rpc=elastic"],
        ["job=plan"],
        ["job=regenerate", "rpc=elastic", "regenerate.backend=service"],
    ],
)
def test_compiled_layers_quantised_weights_several_targets_and_services_go_with_it(overrides):
    assert load(*overrides, SPREAD).topology.devices_per_target == 2
