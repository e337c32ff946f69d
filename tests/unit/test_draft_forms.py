"""Every form of a draft, from a few steps of training to the figures of an evaluation."""

from dataclasses import replace

import pytest
from support.tiny_target import tiny_batch, tiny_mapping, tiny_target_config

import eagle_rpc

TRAIN = eagle_rpc.TrainConfig(max_steps=3, learning_rate=1e-2, device="cpu", autocast=None)
DRAFT = eagle_rpc.DraftConfig(ttt_steps=3)
PROMPTS = [[1, 2, 3], [4, 5], [7, 20, 3, 5, 9]]
FORMS = {
    "eagle3.1": ({"fc_norm": True, "norm_output": True}, [0, 2, 4]),
    "norm_before_fc": ({"norm_before_fc": True, "norm_before_residual": True}, [0, 2, 4]),
    "one_layer_captured": ({}, [3]),
    "two_layers": ({"num_layers": 2, "norm_output": True}, [0, 2, 4]),
    "window": ({"sliding_window": 4}, [0, 2, 4]),
    "five_layers_captured": ({"fc_norm": True, "norm_before_fc": True}, [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_draft_of_any_form_learns_and_is_evaluated_as_it_decodes(tmp_path, form):
    settings, aux_layer_ids = FORMS[form]
    target = replace(tiny_target_config(), aux_layer_ids=aux_layer_ids)
    training = eagle_rpc.DraftTraining(
        eagle_rpc.load_target(target),
        tiny_mapping(),
        target=target,
        draft=replace(DRAFT, **settings),
        train=TRAIN,
    )
    losses = [figures.loss for figures in training.steps([tiny_batch(1)] * 3)]
    assert losses[-1] < losses[0]
    training.export(tmp_path / "draft", dtype=eagle_rpc.DType.float32)
    draft = eagle_rpc.load_draft(tmp_path / "draft")
    assert draft.aux_layer_ids == tuple(aux_layer_ids)
    assert draft.config == training.draft.config
    asked = eagle_rpc.EvaluateConfig(max_new_tokens=12, num_draft_tokens=4, num_decoded=len(PROMPTS))
    result = eagle_rpc.evaluate_draft(target, draft, PROMPTS, settings=asked)
    assert (result.num_decoded, result.counts_agree, result.identical_texts) == (3, True, True)
