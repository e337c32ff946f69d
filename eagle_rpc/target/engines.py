"""The target of a configuration, by its engine."""

from pathlib import Path

import torch

from eagle_rpc.config.choices import TargetEngine
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.vllm_target import VLLMEagle3TargetModel

AnyTargetModel = HFEagle3TargetModel | VLLMEagle3TargetModel


def load_any_target(
    config: TargetConfig, *devices: torch.device | str, cache_dir: str | Path, seed: int = 0
) -> AnyTargetModel:
    """The target on one device, or over several. Raises the errors of the two classes."""
    if config.engine is TargetEngine.vllm:
        return VLLMEagle3TargetModel(config, *devices, cache_dir=cache_dir)
    return HFEagle3TargetModel.load(config, *devices, cache_dir=cache_dir, seed=seed)
