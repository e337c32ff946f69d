"""The stages of a target in one process: their bits together, what each has in memory, and what is refused."""

import pytest
import torch
from support.families import tiny_config, tiny_model
from support.tiny_tokenizer import save_with_tokenizer
from unit.target.test_spread import AUX, KINDS_OF_LAYERS, LAYERS, batch_of

from eagle_rpc.config.choices import CompileMode, DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.supervision import combined_fingerprint
from eagle_rpc.target.model import HFEagle3TargetModel

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "qwen3_moe", "gpt2", "gpt_oss", "bloom"]


def config_of(family):
    changes = {"num_hidden_layers": LAYERS, "initializer_range": 0.3, **KINDS_OF_LAYERS.get(family, {})}
    fields = tiny_config(family, **changes).to_dict()
    return TargetConfig(model="random", random=fields, dtype=DType.float32, aux_layer_ids=AUX)


def stages_of(config, count, cache_dir, num_devices=1):
    return [
        HFEagle3TargetModel.load(config, *["cpu"] * num_devices, cache_dir=cache_dir, stage=(number, count))
        for number in range(count)
    ]


def assert_bits_of_one_process(config, count, tokens, cache_dir, num_devices=1, prepare=lambda target: None):
    """Captured states side by side, last hidden states and logits."""
    alone = HFEagle3TargetModel.load(config, "cpu", cache_dir=cache_dir)
    prepare(alone)
    fields = (tokens.input_ids, tokens.attention_mask, tokens.loss_mask, tokens.segment_ids)
    expected = alone.generate_batch(*fields)
    torch.compiler.reset()
    incoming, aux, width = None, {}, expected.last_hidden_state.shape[-1]
    for stage in stages_of(config, count, cache_dir, num_devices):
        prepare(stage)
        made = stage.run_stage(tokens, incoming)
        places = stage.stage_info().captured
        aux |= dict(zip(places, made.aux_hidden_states.split(width, dim=-1), strict=False))
        incoming = made.handed_on
        torch.compiler.reset()
    assert torch.equal(torch.cat([aux[place] for place in range(len(AUX))], -1), expected.aux_hidden_states)
    assert torch.equal(made.output.last_hidden_state, expected.last_hidden_state)
    rows = expected.last_hidden_state.flatten(0, 1)
    assert torch.equal(made.output.project(rows), expected.project(rows))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_give_the_bits_of_one_process(family, count, tmp_path):
    assert_bits_of_one_process(config_of(family), count, batch_of(1), tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_packed_chats_have_the_bits_of_one_process(family, tmp_path):
    assert_bits_of_one_process(config_of(family), 3, batch_of(1, packed=True), tmp_path)


def test_stages_over_several_devices_have_the_bits_of_one_process(tmp_path):
    assert_bits_of_one_process(config_of("llama"), 2, batch_of(1), tmp_path, num_devices=2)


def test_compiled_stages_have_the_bits_of_one_process(tmp_path):
    """Of a batch in two pieces, both padded."""

    def compiled(target):
        target.compile(["2x24"], packed=True, mode=CompileMode.default)

    assert_bits_of_one_process(config_of("qwen3_moe"), 2, batch_of(1), tmp_path, prepare=compiled)


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "gemma3"])
def test_stages_of_a_stored_model_hold_their_own_weights_alone_and_together_its_identity(family, tmp_path):
    """With a tied head; with experts that transformers stacks while it reads them; in a vision-language model."""
    save_with_tokenizer(tiny_model(family), tmp_path / "model")
    config = TargetConfig(model=str(tmp_path / "model"), dtype=DType.float32, aux_layer_ids=[0, 1, 2])
    assert_bits_of_one_process(config, 2, batch_of(1), tmp_path)
    alone = HFEagle3TargetModel.load(config, "cpu", cache_dir=tmp_path)
    stages = stages_of(config, 2, tmp_path)
    infos = [stage.stage_info() for stage in stages]
    fingerprint = combined_fingerprint([info.weights for info in infos])
    assert fingerprint == alone.model_info().weights_fingerprint
    for stage, info in zip(stages, infos, strict=True):
        names = {line.partition(" ")[2] for line in info.weights.names.splitlines()}
        real = {name for name, one in stage.model.state_dict().items() if not one.is_meta}
        assert names <= real and {name for name in real - names if "embed" not in name} == set()
        assert not any(f"layers.{layer}." in name for layer in range(2) for name in real) or info.number == 0


def test_layers_that_read_more_than_hidden_states_of_earlier_ones_are_refused(tmp_path):
    with pytest.raises(
        UnsupportedTarget, match=r"topology\.stages_per_target must be 1 for Gemma4ForCausalLM"
    ):
        stages_of(config_of("gemma4_text"), 2, tmp_path)
