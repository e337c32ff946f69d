"""A target that is rolled back: by its cache where that is exact, from a copy where layers have states."""

import pytest
import torch
from support.families import tiny_model
from transformers import DynamicCache

from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.evaluate.decoding.greedy import GreedyTarget

LAYERS = [0, 1, 2]
IDS = [5, 9, 17, 30, 8, 44, 71, 3, 12, 60, 7, 28, 33, 90, 41, 6, 19, 55, 23, 80]


@pytest.mark.parametrize(
    ("family", "crops"),
    [
        ("llama", True),
        ("gemma3_text", True),  # windows shorter than the text
        ("lfm2", True),  # convolutions
        ("gemma4_text", True),  # layers without keys of their own
        ("deepseek_v32", True),  # an index of keys
        ("qwen3_5_text", False),  # recurrent states
        ("falcon_h1", False),
    ],
)
def test_guesses_that_are_rolled_back_leave_no_trace(family: str, crops: bool):
    model = tiny_model(family)
    target = GreedyTarget(model, LAYERS)
    assert target._crops is crops
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
        logits = [target.read(IDS[:10], predictions=10).logits_PV]
        for start in range(10, len(IDS), 2):
            read = target.read([*IDS[start : start + 2], 1, 2, 1], predictions=5)
            assert read.aux_NW.shape == (5, 3 * 32)
            logits.append(read.logits_PV[:2])
            target.keep(start + 2)
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-3, atol=1e-4)


def test_a_cache_that_does_not_roll_back_is_refused(monkeypatch):
    monkeypatch.setattr(DynamicCache, "crop", lambda self, tokens_to_remove: None)
    with pytest.raises(UnsupportedTarget, match="LlamaForCausalLM must give with its cache what it gives"):
        GreedyTarget(tiny_model("llama"), LAYERS)


def test_a_model_with_a_cache_of_its_own_is_refused_in_a_sentence():
    with pytest.raises(UnsupportedTarget, match="to be evaluated, MiniMaxForCausalLM must read"):
        GreedyTarget(tiny_model("minimax"), LAYERS)
