"""What goes with a target that vLLM runs, by the settings alone."""

import pytest

from eagle_rpc.config.choices import TargetEngine
from eagle_rpc.config.compose import load
from eagle_rpc.errors import ConfigError

VLLM = "target.engine=vllm"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["target.vllm.tensor_parallel_size=2", "target.vllm.pipeline_parallel_size=2"],
            "topology.devices_per_target must be target.vllm.tensor_parallel_size x "
            "target.vllm.pipeline_parallel_size = 4 with target.engine=vllm, got 1",
        ),
        (
            ["job=verify", "target=smollm2"],
            "target.engine must be transformers with job=verify, whose bits vLLM does not promise, got vllm",
        ),
        (
            ["topology=single"],
            "topology.single must be false with target.engine=vllm, which needs a process of its own, got true",
        ),
        (
            ["target.quantization=int8"],
            "target.quantization must be null with target.engine=vllm, whose own methods target.vllm.quantization "
            "names, got int8",
        ),
        (
            ["target.compile_shapes=[1x64]"],
            "target.compile_shapes must be empty with target.engine=vllm, got ['1x64']",
        ),
        (
            ["target.vllm.gpu_memory_utilization=0"],
            "target.vllm.gpu_memory_utilization must lie in (0, 1], got 0.0",
        ),
    ],
)
def test_what_vllm_does_not_do_is_refused_in_a_sentence(overrides, message):
    with pytest.raises(ConfigError) as refused:
        load(VLLM, *overrides)
    assert str(refused.value) == message


def test_a_random_target_has_no_files_for_an_engine():
    with pytest.raises(
        ConfigError, match=r"random must be empty with target.engine=vllm, which loads stored"
    ):
        load("target=tiny", VLLM)


def test_jobs_that_load_the_model_themselves_take_the_settings_of_the_engine():
    for job in ("evaluate", "regenerate", "export", "plan"):
        assert (
            load(f"job={job}", VLLM, "target.vllm.tensor_parallel_size=2").target.engine is TargetEngine.vllm
        )


def test_the_settings_of_an_engine_without_it_have_no_effect():
    assert load("target.vllm.tensor_parallel_size=2").target.engine is TargetEngine.transformers
