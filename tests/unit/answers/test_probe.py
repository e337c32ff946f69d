"""Which families the batched engine decodes; the others are refused with a reason."""

import pytest
import torch
from support.families import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from eagle_rpc.answers import engine
from eagle_rpc.answers.plain import PlainAnswerer
from eagle_rpc.answers.probe import probe_answers, probe_engine
from eagle_rpc.errors import UnsupportedTarget

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def random_model(model_type, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "olmo2", "phi3", "gpt_neox"])
def test_families_with_plain_attention_pass(model_type, dtype):
    probe_engine(random_model(model_type, dtype))


def test_attention_sinks_are_part_of_the_answers():
    model = random_model("gpt_oss", num_local_experts=2, num_experts_per_tok=1)
    probe_engine(model)
    for layer in model.model.layers:
        layer.self_attn.sinks.data += 5.0
    probe_engine(model)


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4_text"])
def test_narrow_values_and_layers_without_keys_of_their_own_pass(family):
    probe_engine(tiny_model(family))


def test_penalties_and_forced_tokens_of_the_model_do_not_shape_its_answers():
    model = random_model("llama")
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.forced_eos_token_id = 7
    probe_answers(model, PlainAnswerer, "transformers' generate")
    assert model.generation_config.repetition_penalty == 5.0


def test_an_answerer_that_fails_is_refused_like_one_that_errs():
    def fail(*_, **__):
        raise RuntimeError("no such cache")

    model = random_model("llama")
    model.generate = fail
    with pytest.raises(UnsupportedTarget, match="generate cannot decode LlamaForCausalLM: RuntimeError: no"):
        probe_answers(model, PlainAnswerer, "transformers' generate")


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("bloom", {}, "AttentionInterface"),
        ("mamba", {}, "MambaForCausalLM"),
    ],
)
def test_families_with_other_caches_or_attention_are_refused_with_a_reason(model_type, changes, reason):
    with pytest.raises(UnsupportedTarget, match=reason):
        probe_engine(random_model(model_type, **changes))


def test_an_engine_that_chooses_other_tokens_is_found_out(monkeypatch):
    monkeypatch.setattr(engine.BatchCache, "aim", shifted(engine.BatchCache.aim))
    with pytest.raises(UnsupportedTarget, match="does not decode LlamaForCausalLM as the model does"):
        probe_engine(random_model("llama"))


def shifted(aim):
    """Leaves column 0 unwritten, which all rows see."""
    return lambda self, first_row, positions_NT: aim(self, first_row, positions_NT + 1)
