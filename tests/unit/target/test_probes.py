"""The bounds of the probes: rounding passes, leaks do not, in every dtype."""

import pytest
import torch
from support.families import tiny_model

from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.probes import check_causal, packing_fault, recurrent_layers

IDS = torch.arange(32).view(2, 16)
LEAK = 1e-2


def hidden_of(ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(64, 8, generator=draw)[ids].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_as_small_as_the_rounding_of_a_model_is_found(dtype: torch.dtype):
    def run(ids, segments):
        hidden = hidden_of(ids, dtype)
        return hidden if segments is None else hidden + LEAK * hidden.float().mean(1, keepdim=True).to(dtype)

    assert "one chat changes another" in packing_fault(run, IDS)
    assert packing_fault(lambda ids, segments: hidden_of(ids, dtype), IDS) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_that_change_little_are_found(dtype: torch.dtype):
    def run(ids):
        hidden = hidden_of(ids, dtype)
        return hidden + LEAK * hidden.float().mean(1, keepdim=True).to(dtype)

    with pytest.raises(UnsupportedTarget, match="must be causal"):
        check_causal(run, IDS, "Model")


def test_rounding_between_a_packed_chat_and_the_chat_alone_is_none():
    def run(ids, segments):
        hidden = hidden_of(ids, torch.bfloat16)
        return hidden if segments is None else hidden * (1 + 2**-7)

    assert packing_fault(run, IDS) is None


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text", "falcon_h1", "recurrent_gemma", "zamba2"])
def test_layers_that_carry_a_state_take_one_chat_a_row(family: str):
    assert recurrent_layers(tiny_model(family).get_decoder())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v32", "llama4_text", "gpt_oss"])
def test_layers_that_attend_alone_are_no_recurrent_ones(family: str):
    model = tiny_model(family)
    assert not recurrent_layers(model.model)


def test_packed_rows_of_a_model_with_states_are_refused_in_bf16_too():
    model = tiny_model("falcon_h1").to(torch.bfloat16)
    target = HFEagle3TargetModel(model, aux_layer_ids=[0, 1, 2])
    segments = (torch.arange(16) >= 8).long().expand(2, -1)
    with pytest.raises(UnsupportedTarget, match=r"its layers carry a state from token to token\); send one"):
        target.generate_batch(IDS, torch.ones_like(IDS), torch.ones_like(IDS), segments)
