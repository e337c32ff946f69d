"""Stages of a target on GPUs: the bits of one GPU, in every form, and over RPC through host memory."""

import pytest
import torch
from gpu_marks import ON_A_GPU
from gpu_targets import FORMS, batch_of, config_of
from support.families import tiny_config
from support.staged_service import assert_bits_of_one_process, run_job, staged_config

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.target.model import HFEagle3TargetModel

pytestmark = ON_A_GPU
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
    assert_bits_of_one_process(answers, loaded, target)
