"""The words of refusals about vLLM, with a stand-in for it: the engine itself is in tests/rpc/test_vllm_target.py."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from eagle_rpc.config.choices import TargetEngine
from eagle_rpc.config.schema import TargetConfig, VLLMConfig
from eagle_rpc.errors import ConfigError, TargetLost
from eagle_rpc.target import vllm_engine
from eagle_rpc.target.vllm_engine import EngineModel, HiddenStates
from eagle_rpc.target.vllm_target import VLLMEagle3TargetModel

CONFIG = TargetConfig(model="any", engine=TargetEngine.vllm)
MODEL = EngineModel(directory=Path("any"), architecture="LlamaForCausalLM", aux_layer_ids=(1,), max_length=8)
CPU = torch.device("cpu")


@pytest.fixture
def stand_in(monkeypatch):
    """Its `fault` is raised where the engine starts, and `fault_in_pass` in a pass."""
    told = SimpleNamespace(fault=None, fault_in_pass=None, calls=0)

    class LLM:
        def __init__(self, **settings):
            if told.fault is not None:
                raise told.fault

        def encode(self, *args, **settings):
            told.calls += 1
            raise told.fault_in_pass

    vllm, config = ModuleType("vllm"), ModuleType("vllm.config")
    vllm.__version__, vllm.LLM, vllm.PoolingParams = "1.2", LLM, SimpleNamespace
    vllm.ModelRegistry = SimpleNamespace(get_supported_archs=list)
    config.PoolerConfig = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    return told


def test_a_missing_vllm_is_told_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"vLLM is not installed, got vllm: pip install 'eagle-rpc\[vllm\]'"
    ):
        VLLMEagle3TargetModel(CONFIG, CPU, cache_dir="unused")


def test_another_number_of_devices_than_the_engine_uses_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size = 1, got 2"):
        VLLMEagle3TargetModel(CONFIG, CPU, CPU, cache_dir="unused")


def test_a_pipeline_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    config = dataclasses.replace(CONFIG, vllm=VLLMConfig(pipeline_parallel_size=2))
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size must be 1 on a CPU, where .*, got 2"):
        VLLMEagle3TargetModel(config, CPU, CPU, cache_dir="unused")


def test_what_vllm_says_against_a_model_is_passed_on(stand_in):
    stand_in.fault = ValueError("no such\nmodel")
    with pytest.raises(
        ConfigError, match=r"settings with which vLLM 1.2 runs LlamaForCausalLM of any: no such model"
    ):
        HiddenStates(CONFIG, MODEL, [CPU])


def test_an_engine_that_failed_in_a_pass_is_not_asked_again(stand_in):
    engine = HiddenStates(CONFIG, MODEL, [CPU])
    stand_in.fault_in_pass = RuntimeError("the engine is dead")
    for _ in range(2):
        with pytest.raises(TargetLost, match="vLLM failed in a pass"):
            engine.of_prompts([[1, 2]])
    assert stand_in.calls == 1
