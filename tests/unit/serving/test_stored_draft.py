"""Drafts of other trainers, as they lie on disk, become the start of a draft of ours, or are refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_export import CONFIG, EMBEDDING, MAPPING, draft_weights, export

from eagle_rpc.draft import Eagle3Draft
from eagle_rpc.errors import CheckpointError
from eagle_rpc.serving import StoredDraft
from eagle_rpc.supervision import VocabMapping

LAYERS = (1, 5, 8)
WEIGHTS = {name: tensor for name, tensor in draft_weights().items() if name != "embed_tokens.weight"}
PLAIN = {
    "hidden_size": 8,
    "vocab_size": 10,
    "draft_vocab_size": 3,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}


def write(directory: Path, config: dict, tensors: dict[str, torch.Tensor], *, files: int = 1) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    for number in range(files):
        part = {name: tensors[name].contiguous() for name in names[number::files]}
        save_file(part, directory / f"model-{number + 1:05}-of-{files:05}.safetensors")
    return directory


def of_specforge(directory: Path) -> Path:
    maps = {"d2t": MAPPING.d2t, "t2d": MAPPING.t2d}
    config = {**PLAIN, "architectures": ["LlamaForCausalLMEagle3"], "tie_word_embeddings": False}
    return write(directory, config, {**WEIGHTS, **maps})


def of_nemo(directory: Path) -> Path:
    """Draft id i is token [9, 1, 4][i]; the rows of the head are in that order."""
    unsorted = torch.tensor([9, 1, 4])
    tensors = {
        f"model.{name.replace('midlayer.', 'layers.0.')}": tensor
        for name, tensor in WEIGHTS.items()
        if name != "lm_head.weight"
    }
    tensors["model.embed_tokens.weight"] = EMBEDDING
    tensors["lm_head.weight"] = WEIGHTS["lm_head.weight"][[2, 0, 1]]
    tensors |= {"d2t": unsorted - torch.arange(3), "t2d": MAPPING.t2d}
    return write(directory, {**PLAIN, "architectures": ["LlamaEagle3DraftModel"]}, tensors, files=3)


def of_speculators(directory: Path, **changes: object) -> Path:
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in WEIGHTS.items()}
    tensors |= {"embed_tokens.weight": EMBEDDING, "d2t": MAPPING.d2t, "t2d": MAPPING.t2d}
    config = {
        "speculators_model_type": "eagle3",
        "transformer_layer_config": {
            "hidden_size": 8,
            "vocab_size": 10,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        },
        "draft_vocab_size": 3,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [2, 6, 9, 12],
        **changes,
    }
    return write(directory, {name: value for name, value in config.items() if value is not None}, tensors)


def of_ours(directory: Path) -> Path:
    export(directory, dtype=torch.float32)
    return directory


def started_from(stored: StoredDraft, mapping: VocabMapping = MAPPING) -> dict[str, torch.Tensor]:
    draft = Eagle3Draft(replace(CONFIG, draft_vocab_size=len(mapping)), EMBEDDING)
    draft.initialise(seed=7)
    stored.load_into(draft, mapping)
    return draft.state_dict()


@pytest.mark.parametrize("form", [of_ours, of_specforge, of_nemo, of_speculators])
def test_every_form_gives_the_same_draft(tmp_path, form):
    stored = StoredDraft.open(form(tmp_path / "draft"))
    stored.require_fit(CONFIG, LAYERS)
    assert stored.mapping.selected_token_ids.tolist() == [1, 4, 9]
    state = started_from(stored)
    for name, tensor in WEIGHTS.items():
        assert torch.equal(state[name], tensor), name
    # The embedding is the target's own.
    assert torch.equal(state["embed_tokens.weight"], EMBEDDING)


def with_own_embedding(directory, factor=2):
    own = {**WEIGHTS, "embed_tokens.weight": factor * EMBEDDING, "d2t": MAPPING.d2t, "t2d": MAPPING.t2d}
    return StoredDraft.open(write(directory, PLAIN, own))


def test_a_draft_that_trains_its_embedding_begins_with_the_stored_one(tmp_path):
    stored = with_own_embedding(tmp_path / "draft")
    stored.require_fit(CONFIG, LAYERS)
    draft = Eagle3Draft(CONFIG, EMBEDDING.bfloat16())
    draft.train_embeddings()
    stored.load_into(draft, stored.mapping)
    assert draft.embed_tokens.weight.dtype == torch.float32
    assert torch.equal(draft.embed_tokens.weight, 2 * EMBEDDING)


def test_a_trained_embedding_that_is_left_out_is_told(tmp_path, caplog):
    started_from(StoredDraft.open(of_ours(tmp_path / "plain")))
    assert "an embedding of its own" not in caplog.text
    state = started_from(with_own_embedding(tmp_path / "draft"))
    assert torch.equal(state["embed_tokens.weight"], EMBEDDING)
    assert "was trained with an embedding of its own" in caplog.text


def test_the_same_weights_have_the_same_digest_wherever_they_lie(tmp_path):
    digests = {StoredDraft.open(of_specforge(tmp_path / name)).digest for name in ("here", "there")}
    assert len(digests) == 1
    changed = of_specforge(tmp_path / "changed")
    save_file({**WEIGHTS, "norm.weight": torch.zeros(8)}, changed / "model-00001-of-00001.safetensors")
    assert StoredDraft.open(changed).digest not in digests


def test_a_trained_embedding_is_part_of_the_digest(tmp_path):
    drafts = [with_own_embedding(tmp_path / str(factor), factor) for factor in (2, 3)]
    assert drafts[0].digest != drafts[1].digest


def test_rows_of_the_head_follow_their_tokens_into_another_vocabulary(tmp_path):
    stored = StoredDraft.open(of_nemo(tmp_path / "draft"))
    wider = VocabMapping.from_token_ids(torch.tensor([0, 4, 7, 9]), 10)
    stored.require_fit(replace(CONFIG, draft_vocab_size=4), LAYERS)
    fresh = Eagle3Draft(replace(CONFIG, draft_vocab_size=4), EMBEDDING)
    fresh.initialise(seed=7)
    head = started_from(stored, wider)["lm_head.weight"]
    assert torch.equal(head[[1, 3]], WEIGHTS["lm_head.weight"][[1, 2]])
    assert torch.equal(head[[0, 2]], fresh.lm_head.weight[[0, 2]])


def test_a_draft_without_a_map_has_the_targets_vocabulary(tmp_path):
    whole = {**WEIGHTS, "lm_head.weight": torch.randn(10, 8)}
    stored = StoredDraft.open(write(tmp_path / "draft", PLAIN, whole))
    assert stored.mapping.selected_token_ids.tolist() == list(range(10))


def test_half_formats_become_fp32(tmp_path):
    halves = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    stored = StoredDraft.open(write(tmp_path / "draft", PLAIN, {**halves, "d2t": MAPPING.d2t}))
    state = started_from(stored)
    assert all(state[name].dtype is torch.float32 for name in WEIGHTS)
    assert torch.equal(state["fc.weight"], halves["fc.weight"].float())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"fc.weight": None}, r"must hold fc\.weight, which is missing"),
        (
            {"midlayer.self_attn.q_proj.bias": torch.zeros(24)},
            r"alone, got midlayer\.self_attn\.q_proj\.bias",
        ),
        ({"layers.1.mlp.up_proj.weight": torch.zeros(20, 8)}, r"alone, got layers\.1\.mlp\.up_proj\.weight"),
        ({"norm.weight": torch.zeros(9)}, r"norm\.weight must have shape \[8\], got \[9\]"),
        ({"lm_head.weight": torch.zeros(3, 9)}, r"lm_head\.weight must have shape \[3, 8\], got \[3, 9\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_shape(tmp_path, tensors, message):
    changed = {name: tensor for name, tensor in {**WEIGHTS, **tensors}.items() if tensor is not None}
    stored = StoredDraft.open(write(tmp_path / "draft", PLAIN, {**changed, "d2t": MAPPING.d2t}))
    with pytest.raises(CheckpointError, match=message):
        stored.require_fit(CONFIG, LAYERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_before_residual": None}, r"draft\.norm_before_residual must be true, as .* got false"),
        ({"fc_norm": True}, r"draft\.fc_norm must be true, as .* got false"),
        ({"eagle_config": {"norm_before_fc": True}}, r"draft\.norm_before_fc must be true"),
        (
            {"eagle_aux_hidden_state_layer_ids": [1, 6, 9, 12]},
            r"target\.aux_layer_ids must be \[0, 5, 8\], .* got \[1, 5, 8\]",
        ),
        (
            {"transformer_layer_config": {"vocab_size": 12}},
            r"must be of a target with 10 tokens, got 12",
        ),
    ],
)
def test_a_draft_of_another_kind_is_refused_by_the_setting_that_differs(tmp_path, changes, message):
    stored = StoredDraft.open(of_speculators(tmp_path / "draft", **changes))
    with pytest.raises(CheckpointError, match=message):
        stored.require_fit(CONFIG, LAYERS)


def test_values_that_training_adapts_to_are_named(tmp_path, caplog):
    stored = StoredDraft.open(
        write(tmp_path / "draft", {**PLAIN, "rope_theta": 1e4}, {**WEIGHTS, "d2t": MAPPING.d2t})
    )
    stored.require_fit(CONFIG, LAYERS)
    assert "was trained with rope_theta=10000.0, this run has 500000.0" in caplog.text


def test_what_is_no_draft_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json must be the JSON file of an EAGLE-3 draft"):
        StoredDraft.open(tmp_path)
    cases = {
        "must hold safetensors files, got none": (PLAIN, {}),
        r"must hold lm_head\.weight": (PLAIN, {"fc.weight": torch.zeros(1)}),
        "speculators_model_type must be eagle3, got dflash": ({"speculators_model_type": "dflash"}, WEIGHTS),
        "d2t must hold offsets to distinct target ids": (PLAIN, {**WEIGHTS, "d2t": torch.tensor([1, 0, 3])}),
        r"d2t must name 3 tokens, the rows of lm_head\.weight, got 2": (
            PLAIN,
            {**WEIGHTS, "d2t": torch.tensor([1, 3])},
        ),
    }
    for number, (message, (config, tensors)) in enumerate(cases.items()):
        directory = write(tmp_path / str(number), config, tensors, files=1 if tensors else 0)
        with pytest.raises(CheckpointError, match=message):
            StoredDraft.open(directory)
