"""Stages of a target on GPUs: the bits of one GPU, in every form, and over RPC through host memory."""

import dataclasses

import numpy as np
import pytest
import torch
from gpu_targets import FORMS, batch_of, config_of
from support.families import tiny_config
from support.staged_service import ENCODINGS, as_numpy, batches, run_job, staged_config
from support.tiny_target import tensors_of, tiny_mapping

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import SessionSettings
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = "cuda:0"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_stages_give_the_bits_of_one_gpu(form, packed, tmp_path):
    config, tokens = config_of(form), batch_of(4, 300, packed=packed)
    alone = HFEagle3TargetModel.load(config, GPU, cache_dir=tmp_path)
    masks = tokens.attention_mask, tokens.loss_mask, tokens.segment_ids
    expected = alone.generate_batch(tokens.input_ids, *masks)
    torch.compiler.reset()
    incoming, aux = None, []
    for number in range(2):
        stage = HFEagle3TargetModel.load(config, GPU, cache_dir=tmp_path, stage=(number, 2))
        made = stage.run_stage(tokens, incoming)
        aux.append(made.aux_hidden_states)
        # Through host memory, as between processes.
        incoming = [piece.cpu().to(GPU) for piece in made.handed_on]
        torch.compiler.reset()
    assert torch.equal(torch.cat(aux, -1), expected.aux_hidden_states)
    assert torch.equal(made.output.last_hidden_state, expected.last_hidden_state)


@pytest.mark.rpc
def test_stages_in_processes_of_their_own_give_the_bits_of_one_gpu():
    """All on this GPU, or on one each where there are enough."""
    fields = tiny_config("llama", num_hidden_layers=6, initializer_range=0.3).to_dict()
    target = TargetConfig(
        model="tiny", random=fields, dtype=DType.bfloat16, device="auto", aux_layer_ids=[4, 0, 2]
    )
    config = staged_config(target, 2)
    answers = run_job(config)
    loaded = HFEagle3TargetModel.load(target, GPU, cache_dir="unused", seed=0)
    for encoding, (made, info) in zip(ENCODINGS, answers, strict=True):
        alone = ColocatedEagle3TargetModel(loaded, target, SessionSettings(encoding=encoding))
        alone.open_session(tiny_mapping())
        assert info == dataclasses.replace(alone.model_info(), incarnation="")
        for found, tokens in zip(made, batches(), strict=True):
            masks = tokens.attention_mask, tokens.loss_mask, tokens.segment_ids
            expected = tensors_of(alone.generate_batch(tokens.input_ids, *masks))
            for name, tensor in expected.items():
                assert np.array_equal(found[name], as_numpy(tensor)), (encoding, name)
