"""The form of speculators: the same draft under other names."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_export import AUX_KEY, CONFIG, EMBEDDING, MAPPING, draft_weights

from eagle_rpc.errors import ConfigError
from eagle_rpc.serving import StoredDraft
from eagle_rpc.serving.engine_run import engine_python, shifted_layers
from eagle_rpc.serving.engine_side import DecodingOutcome, _of_histogram
from eagle_rpc.serving.export import export_draft, load_export
from eagle_rpc.serving.speculators_config import Speculators

FORMS = {
    "plain": CONFIG,
    "eagle_3.1": replace(CONFIG, fc_norm=True, norm_output=True),
    "norms": replace(CONFIG, norm_before_fc=True, norm_before_residual=True),
    "layers": replace(CONFIG, num_layers=2, sliding_window=64),
}


def export(directory, config=CONFIG, *, speculators=True, aux_layer_ids=(1, 5, 8)):
    return export_draft(
        draft_weights(config),
        config,
        MAPPING,
        directory,
        dtype=torch.float32,
        aux_layer_ids=aux_layer_ids,
        target_embedding=EMBEDDING,
        bos_token_id=1,
        eos_token_id=[2, 3],
        speculators=Speculators("owner/target", 5) if speculators else None,
    )


def test_the_layer_is_layers_0_and_the_layers_keys_are_inside(tmp_path):
    config_file, weights_file = export(tmp_path / "draft")
    config = json.loads(config_file.read_text())
    layer = config.pop("transformer_layer_config")
    assert (config["speculators_model_type"], config["draft_vocab_size"]) == ("eagle3", 3)
    assert config[AUX_KEY] == [2, 6, 9] and config["norm_before_residual"] is False
    spoken = config["speculators_config"]
    assert spoken["verifier"]["name_or_path"] == "owner/target"
    assert spoken["proposal_methods"][0]["speculative_tokens"] == 5
    assert layer["hidden_size"] == 8 and layer["vocab_size"] == 10 and layer["model_type"] == "llama"
    assert AUX_KEY not in layer and "architectures" not in layer
    names = load_file(weights_file).keys()
    assert "layers.0.hidden_norm.weight" in names and not [name for name in names if "midlayer" in name]


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_both_forms_are_read_as_the_same_draft(tmp_path, config):
    export(tmp_path / "plain", config, speculators=False)
    export(tmp_path / "speculators", config)
    plain, speculators = (load_export(tmp_path / name) for name in ("plain", "speculators"))
    assert replace(plain, weights={}, mapping=None) == replace(speculators, weights={}, mapping=None)
    assert plain.mapping.digest == speculators.mapping.digest
    assert plain.weights.keys() == speculators.weights.keys()
    for name, tensor in plain.weights.items():
        assert torch.equal(tensor, speculators.weights[name]), name


def test_training_may_start_from_either_form(tmp_path):
    export(tmp_path / "draft", FORMS["norms"])
    stored = StoredDraft.open(tmp_path / "draft")
    stored.require_fit(FORMS["norms"], (1, 5, 8))


@pytest.mark.parametrize("speculators", [False, True])
@pytest.mark.parametrize(("layers", "shifted"), [((1, 5, 8), (2, 6, 9)), ((1, 5, 9), (0, 4, 8))])
def test_a_control_captures_the_neighbours_and_leaves_the_export_alone(
    tmp_path, speculators, layers, shifted
):
    export(tmp_path / "draft", speculators=speculators, aux_layer_ids=layers)
    with shifted_layers(tmp_path / "draft", 10) as copy:
        assert load_export(copy).aux_layer_ids == shifted
    assert load_export(tmp_path / "draft").aux_layer_ids == layers
    assert not copy.exists()


def test_a_control_without_neighbours_is_refused(tmp_path):
    export(tmp_path / "draft", aux_layer_ids=(0, 5, 9))
    with (
        pytest.raises(ConfigError, match=r"serve_check\.control must be false"),
        shifted_layers(tmp_path / "draft", 10),
    ):
        pass


def test_an_engine_is_looked_for_here_and_a_named_python_must_run(tmp_path):
    assert engine_python("no_such_engine", None) is None
    with pytest.raises(ConfigError, match=r"serve_check\.vllm_python must be a Python that can be run, got"):
        engine_python("vllm", str(tmp_path / "python"))


def test_a_histogram_of_accepted_guesses_gives_drafts_and_positions():
    # 5 drafts accepted nothing, 3 one guess, 2 all three.
    assert _of_histogram({"spec_accept_histogram": [5, 3, 0, 2]}, 3) == (10, [5, 2, 2])
    assert _of_histogram({"spec_correct_drafts_histogram": [4]}, 2) == (4, [0, 0])


def test_counts_of_an_outcome_are_those_of_all_prompts():
    outcome = DecodingOutcome("1", [[1], [2]], [3, 1], [[2, 1], [1, 0]])
    assert outcome.counts == (4, [3, 1]) and outcome.accept_length == 2.0
