import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.errors import CheckpointError, ConfigError
from eagle_rpc.serving.export import export_draft, load_export
from eagle_rpc.supervision import VocabMapping

CONFIG = Eagle3DraftConfig(
    hidden_size=8,
    intermediate_size=20,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    vocab_size=10,
    draft_vocab_size=3,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    max_position_embeddings=128,
)
MAPPING = VocabMapping.from_token_ids(torch.tensor([9, 1, 4]), 10)
EMBEDDING = torch.arange(80.0).view(10, 8)
AUX_KEY = "eagle_aux_hidden_state_layer_ids"
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def draft_weights(config=CONFIG):
    draft = Eagle3Draft(config, torch.zeros(config.vocab_size, config.hidden_size))
    draft.initialise(seed=1)
    return draft.state_dict()


def export(
    directory, *, weights=None, config=CONFIG, mapping=MAPPING, dtype=torch.bfloat16, aux_layer_ids=(1, 5, 8)
):
    return export_draft(
        draft_weights(config) if weights is None else weights,
        config,
        mapping,
        directory,
        dtype=dtype,
        aux_layer_ids=aux_layer_ids,
        target_embedding=EMBEDDING,
        bos_token_id=1,
        eos_token_id=[2, 3],
    )


def test_config_holds_exactly_the_keys_that_engines_read(tmp_path):
    export(tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": 10,
        "draft_vocab_size": 3,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 128,
        "norm_before_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "eagle_aux_hidden_state_layer_ids": [2, 6, 9],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8], "use_aux_hidden_state": True},
    }


EAGLE_31 = replace(CONFIG, fc_norm=True, norm_output=True)


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (EAGLE_31, {"fc_norm": True, "norm_output": True}),
        (replace(CONFIG, norm_before_fc=True), {"norm_before_fc": True}),
    ],
)
def test_norms_are_told_to_engines_only_if_they_are_on(tmp_path, config, keys):
    export(tmp_path / "plain")
    export(tmp_path / "normed", config=config)
    plain, normed = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "normed")
    )
    inner = normed.pop("eagle_config")
    assert normed == {name: plain[name] for name in plain if name != "eagle_config"} | keys
    assert inner.get("norm_before_fc", False) == config.norm_before_fc


def test_norms_before_the_projection_have_the_names_that_engines_load(tmp_path):
    config = replace(EAGLE_31, norm_before_fc=True)
    plain = load_file(export(tmp_path / "plain")[1])
    normed = load_file(export(tmp_path / "normed", config=config)[1])
    added = {name: tuple(normed[name].shape) for name in normed.keys() - plain.keys()}
    assert added == {"input_norm.weight": (24,)} | {f"fc_norm.{place}.weight": (8,) for place in range(3)}


def test_several_layers_have_the_names_that_each_engine_loads(tmp_path):
    config = replace(CONFIG, num_layers=3, sliding_window=64)
    weights = draft_weights(config)
    weights["layers.2.input_layernorm.weight"] = torch.arange(8.0)
    config_path, weights_path = export(tmp_path, config=config, weights=weights, dtype=torch.float32)
    written, tensors = json.loads(config_path.read_text()), load_file(weights_path)
    assert written["num_hidden_layers"] == 3
    assert (written["sliding_window"], written["layer_types"]) == (64, ["sliding_attention"] * 3)
    assert not any("midlayer" in name for name in tensors)
    shapes = {
        name: tuple(tensors[f"layers.{name}.weight"].shape)
        for name in (
            "0.self_attn.q_proj",
            "0.hidden_norm",
            "1.self_attn.q_proj",
            "1.hidden_norm",
            "1.input_layernorm",
        )
    }
    assert list(shapes.values()) == [(24, 16), (8,), (24, 8), (8,), (8,)]
    # vLLM reads the first of these, SGLang and TensorRT-LLM the second.
    for name in ("input_layernorm", "hidden_norm"):
        assert torch.equal(tensors[f"layers.2.{name}.weight"], torch.arange(8.0))
    read = load_export(tmp_path)
    assert read.config == config
    assert read.weights.keys() == weights.keys()
    assert AutoConfig.from_pretrained(tmp_path).layer_types == ["sliding_attention"] * 3


def test_names_of_other_programs_are_read(tmp_path):
    config = replace(EAGLE_31, num_layers=2)
    _, weights = export(tmp_path, config=config)
    expected = load_export(tmp_path).weights
    tensors = load_file(weights)
    del tensors["layers.1.hidden_norm.weight"]
    save_file({name if "lm_head" in name else f"model.{name}": one for name, one in tensors.items()}, weights)
    read = load_export(tmp_path).weights
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], one) for name, one in expected.items())


def test_the_two_names_of_a_norm_must_agree(tmp_path):
    _, weights = export(tmp_path, config=replace(CONFIG, num_layers=2))
    tensors = load_file(weights)
    tensors["layers.1.hidden_norm.weight"] += 1
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"layers\.1\.hidden_norm\.weight must be equal"):
        load_export(tmp_path)


def test_tensors_have_the_names_shapes_and_dtypes_that_engines_load(tmp_path):
    files = export(tmp_path / "export")
    assert files == [tmp_path / "export" / "config.json", tmp_path / "export" / "model.safetensors"]
    tensors = load_file(files[1])
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "fc.weight": ((8, 24), torch.bfloat16),
        "midlayer.hidden_norm.weight": ((8,), torch.bfloat16),
        "midlayer.input_layernorm.weight": ((8,), torch.bfloat16),
        "midlayer.post_attention_layernorm.weight": ((8,), torch.bfloat16),
        "midlayer.self_attn.q_proj.weight": ((24, 16), torch.bfloat16),
        "midlayer.self_attn.k_proj.weight": ((12, 16), torch.bfloat16),
        "midlayer.self_attn.v_proj.weight": ((12, 16), torch.bfloat16),
        "midlayer.self_attn.o_proj.weight": ((8, 24), torch.bfloat16),
        "midlayer.mlp.gate_proj.weight": ((20, 8), torch.bfloat16),
        "midlayer.mlp.up_proj.weight": ((20, 8), torch.bfloat16),
        "midlayer.mlp.down_proj.weight": ((8, 20), torch.bfloat16),
        "norm.weight": ((8,), torch.bfloat16),
        "lm_head.weight": ((3, 8), torch.bfloat16),
        "embed_tokens.weight": ((10, 8), torch.bfloat16),
        "d2t": ((3,), torch.int64),
        "t2d": ((10,), torch.bool),
    }
    assert tensors["d2t"].tolist() == [1, 3, 7]
    assert tensors["t2d"].nonzero().flatten().tolist() == [1, 4, 9]
    assert torch.equal(tensors["embed_tokens.weight"], EMBEDDING.bfloat16())


def test_custom_layers_are_written_in_the_counting_of_each_engine(tmp_path):
    export(tmp_path / "export", aux_layer_ids=(0, 3, 11))
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 4, 12]
    assert config["eagle_config"] == {
        "eagle_aux_hidden_state_layer_ids": [0, 3, 11],
        "use_aux_hidden_state": True,
    }
    assert load_export(tmp_path / "export").aux_layer_ids == (0, 3, 11)


def test_layers_out_of_order_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must ascend.*\[5, 1, 8\]"):
        export(tmp_path / "export", aux_layer_ids=(5, 1, 8))


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_transformers_reads_the_rotary_settings_back(tmp_path, scaling):
    export(tmp_path / "export", config=replace(CONFIG, rope_scaling=scaling))
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert written.get("rope_scaling") == scaling
    rope = AutoConfig.from_pretrained(tmp_path / "export").rope_parameters
    assert rope == {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}


@pytest.mark.parametrize(
    ("scales", "factor"), [({}, 1.0), ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1 / (0.1 * math.log(40) + 1))]
)
def test_engines_are_told_the_attention_factor_of_yarn(tmp_path, scales, factor):
    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, **scales}
    export(tmp_path / "export", config=replace(CONFIG, rope_scaling=yarn))
    written = json.loads((tmp_path / "export" / "config.json").read_text())["rope_scaling"]
    assert written.pop("attn_factor") == pytest.approx(factor)
    assert written == yarn


def test_an_export_reads_back_as_it_was_written(tmp_path):
    norms = {"norm_before_residual": True, "norm_before_fc": True, "fc_norm": True, "norm_output": True}
    config = replace(CONFIG, rope_scaling=SCALING, **norms)
    weights = draft_weights(config)
    export(tmp_path / "export", weights=weights, config=config, dtype=torch.float32)
    read = load_export(tmp_path / "export")
    assert read.config == config
    assert read.aux_layer_ids == (1, 5, 8)
    assert torch.equal(read.mapping.selected_token_ids, MAPPING.selected_token_ids)
    assert read.mapping.target_vocab_size == 10
    assert read.weights.keys() == weights.keys()
    for name, weight in read.weights.items():
        assert torch.equal(weight, EMBEDDING if name == "embed_tokens.weight" else weights[name]), name


def test_a_draft_of_the_whole_vocabulary_needs_no_map(tmp_path):
    config = replace(CONFIG, draft_vocab_size=10)
    export(tmp_path / "export", config=config, mapping=VocabMapping.from_token_ids(torch.arange(10), 10))
    assert not {"d2t", "t2d"} & load_file(tmp_path / "export" / "model.safetensors").keys()
    assert load_export(tmp_path / "export").mapping.selected_token_ids.tolist() == list(range(10))


def test_an_earlier_export_is_replaced_and_nothing_else_is_left(tmp_path):
    export(tmp_path / "export", dtype=torch.float32)
    export(tmp_path / "export", dtype=torch.float16)
    assert load_export(tmp_path / "export").weights["norm.weight"].dtype == torch.float16
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_refused_export_leaves_the_earlier_one_alone(tmp_path):
    export(tmp_path / "export", dtype=torch.float32)
    weights = draft_weights()
    del weights["fc.weight"]
    with pytest.raises(CheckpointError, match=r"fc\.weight, which is missing"):
        export(tmp_path / "export", weights=weights)
    assert load_export(tmp_path / "export").weights["norm.weight"].dtype == torch.float32


def test_a_directory_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        export(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_weights_file_is_as_readable_as_the_config(tmp_path):
    config, weights = export(tmp_path / "export")
    assert config.stat().st_mode == weights.stat().st_mode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"midlayer.self_attn.q_proj.weight": torch.zeros(24, 8)},
            r"q_proj\.weight must have shape \[24, 16\], got \[24, 8\]",
        ),
        (
            {"midlayer.self_attn.q_proj.bias": torch.zeros(24)},
            r"got midlayer\.self_attn\.q_proj\.bias as well",
        ),
    ],
)
def test_weights_that_are_not_the_configs_are_refused(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "export", weights=draft_weights() | change)


def test_a_mapping_of_another_size_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must hold 3 of 10 tokens.*got 2 of 10"):
        export(tmp_path / "export", mapping=VocabMapping.from_token_ids(torch.tensor([0, 1]), 10))


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures must be"),
        ({"num_hidden_layers": 2}, r"must hold layers\.1\.input_layernorm\.weight, which is missing"),
        ({"sliding_window": 32}, r"layer_types must be \['sliding_attention'\], got None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False, got True"),
        ({"head_dim": 7}, "head_dim must be even"),
        (
            {"intermediate_size": 21},
            r"midlayer\.mlp\.down_proj\.weight must have shape \[8, 21\], got \[8, 20\]",
        ),
        (
            {
                "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
                "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
            },
            "one less",
        ),
        ({"num_aux_hidden_states": 4}, r"number of the captured layers, \[1, 5, 8\], got 4"),
        ({"fc_norm": True}, r"must hold fc_norm\.0\.weight, which is missing"),
    ],
)
def test_reading_a_config_that_does_not_fit_says_what_is_wrong(tmp_path, changes, message):
    export(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_export(tmp_path)


def test_reading_a_config_without_layers_leaves_the_targets_default(tmp_path):
    export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eagle_aux_hidden_state_layer_ids"], config["eagle_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_export(tmp_path).aux_layer_ids is None


def test_a_norm_before_the_projection_may_be_named_where_engines_look_for_it(tmp_path):
    export(tmp_path, config=replace(CONFIG, norm_before_fc=True))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["norm_before_fc"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_export(tmp_path).config.norm_before_fc


def test_reading_without_a_required_field_names_it(tmp_path):
    export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rope_theta"):
        load_export(tmp_path)


def test_reading_a_directory_without_an_export_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json must be a JSON file"):
        load_export(tmp_path)


def test_reading_a_torn_weights_file_names_it(tmp_path):
    _, weights = export(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors must be a safetensors file"):
        load_export(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 3, 6], "d2t and t2d must name the same 3 tokens"),
        ([1, 0, 7], "distinct"),
        ([1, 3, 8], r"lie in \[0, 10\)"),
    ],
)
def test_reading_a_map_that_cannot_be_right_is_refused(tmp_path, offsets, message):
    _, weights = export(tmp_path)
    tensors = load_file(weights)
    tensors["d2t"] = torch.tensor(offsets)
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=message):
        load_export(tmp_path)
