"""A target of two and three stages in processes of their own over real RPC: the bits of one process."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from support.families import tiny_config
from support.staged_service import ENCODINGS, batches, run_job, staged_config
from support.tiny_target import tensors_of, tiny_mapping

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import SessionSettings
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

pytestmark = [pytest.mark.rpc, pytest.mark.slow]

# Not in the order of the layers.
AUX = [4, 0, 2]


def target_config(family: str) -> TargetConfig:
    changes: dict[str, Any] = {"num_hidden_layers": 6, "initializer_range": 0.3}
    if family == "gemma3_text":
        changes["layer_types"] = None
    fields = tiny_config(family, **changes).to_dict()
    return TargetConfig(model="tiny", random=fields, dtype=DType.float32, device="cpu", aux_layer_ids=AUX)


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "qwen3_moe"])
def test_stages_in_processes_of_their_own_give_the_bits_of_one_process(family: str, num_stages: int):
    config = target_config(family)
    answers = run_job(staged_config(config, num_stages))
    target = HFEagle3TargetModel.load(config, "cpu", cache_dir="unused", seed=0)
    for encoding, (made, info) in zip(ENCODINGS, answers, strict=True):
        alone = ColocatedEagle3TargetModel(target, config, SessionSettings(encoding=encoding))
        alone.open_session(tiny_mapping())
        assert info == dataclasses.replace(alone.model_info(), incarnation="")
        for found, tokens in zip(made, batches(), strict=True):
            masks = tokens.attention_mask, tokens.loss_mask, tokens.segment_ids
            expected = tensors_of(alone.generate_batch(tokens.input_ids, *masks))
            for name, tensor in expected.items():
                assert np.array_equal(found[name], tensor.numpy()), (encoding, name)
