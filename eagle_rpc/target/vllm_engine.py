"""vLLM's engine as a source of hidden states.

Legend: T tokens of a prompt, W width of all captured states, H target hidden.
"""

import importlib.util
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError, TargetLost, in_one_line
from eagle_rpc.process.environment import prepare_vllm, without_torchrun
from eagle_rpc.process.watchdog import watchdog
from eagle_rpc.target import vllm_plugin

logger = logging.getLogger(__name__)

# Bytes for keys and values on a CPU, where vLLM would take a share of the host's memory.
_CPU_CACHE_BYTES = 2**30
_TASK = "token_embed"


def require_vllm() -> None:
    """Raises `ConfigError` if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "target.engine must be transformers where vLLM is not installed, got vllm: "
            "pip install 'eagle-rpc[vllm]', in an environment of its own since vLLM names its torch"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineModel:
    """The model that an engine loads."""

    directory: Path
    architecture: str
    aux_layer_ids: tuple[int, ...]
    max_length: int


class HiddenStates:
    """An engine that returns captured and last hidden states of prompts. One thread at a time may call it."""

    def __init__(self, config: TargetConfig, model: EngineModel, devices: Sequence[torch.device]) -> None:
        """Loads the model over `devices`. Ends the process after `target.vllm.start_timeout` seconds.

        Raises `ConfigError` if vLLM cannot run the model with these settings.
        """
        self._config = config.vllm
        self._lost: str | None = None
        started = time.monotonic()
        on_cpu = devices[0].type == "cpu"
        prepare_vllm(in_this_process=on_cpu)
        import vllm

        vllm_plugin.register()
        self.name = f"vLLM {vllm.__version__}"
        bounded = watchdog(config.vllm.start_timeout, "the start of vLLM (target.vllm.start_timeout)")
        with bounded, without_torchrun():
            try:
                self._llm = vllm.LLM(**_arguments(config, model, devices))
            except (
                AssertionError,
                NotImplementedError,
                OSError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                rule = f"target.vllm must be settings with which {self.name} runs"
                raise ConfigError(
                    f"{rule} {model.architecture} of {model.directory}: {in_one_line(error)}"
                ) from error
        self._params = vllm.PoolingParams(use_activation=False)
        logger.info("%s started in %.1f s", self.name, time.monotonic() - started)

    def of_prompts(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """[T, W + H] of each prompt on the CPU, in the target's dtype; the engine forms its own batches.

        Ends the process after `target.vllm.pass_timeout` seconds. Raises `TargetLost` once the engine has failed,
        since a step that broke off may leave requests behind.
        """
        if self._lost is not None:
            raise TargetLost(self._lost)
        asked: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with watchdog(self._config.pass_timeout, "a pass of vLLM (target.vllm.pass_timeout)"):
            try:
                replies = self._llm.encode(asked, self._params, pooling_task=_TASK, use_tqdm=False)
            except Exception as error:
                # vLLM has no base class of its errors, and after any of them its state is unknown.
                self._lost = f"vLLM failed in a pass ({type(error).__name__}: {in_one_line(error)})"
                raise TargetLost(self._lost) from error
        return [reply.outputs.data for reply in replies]


def _arguments(config: TargetConfig, model: EngineModel, devices: Sequence[torch.device]) -> dict[str, Any]:
    from vllm.config import PoolerConfig

    asked, dtype = config.vllm, config.dtype.value
    overrides = {
        "architectures": [vllm_plugin.registered_name(model.architecture)],
        # Otherwise states in half formats come out as fp32.
        "head_dtype": dtype,
        vllm_plugin.LAYERS: list(model.aux_layer_ids),
    }
    on_cpu = devices[0].type == "cpu"
    cache = None if asked.kv_cache_gib is None else int(asked.kv_cache_gib * 2**30)
    return {
        "model": str(model.directory),
        "runner": "pooling",
        "hf_overrides": overrides,
        "pooler_config": PoolerConfig(task=_TASK),
        "dtype": dtype,
        "max_model_len": model.max_length,
        "max_num_batched_tokens": asked.max_batched_tokens,
        "tensor_parallel_size": asked.tensor_parallel_size,
        "pipeline_parallel_size": asked.pipeline_parallel_size,
        "enable_expert_parallel": asked.expert_parallel,
        "device_ids": None if on_cpu else [device.index or 0 for device in devices],
        "gpu_memory_utilization": asked.gpu_memory_utilization,
        "kv_cache_memory_bytes": _CPU_CACHE_BYTES if on_cpu and cache is None else cache,
        "quantization": asked.quantization,
        "enforce_eager": asked.enforce_eager,
        # Supervision needs the states of every token.
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "trust_remote_code": False,
    }
