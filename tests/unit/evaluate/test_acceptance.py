import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.errors import ConfigError, TargetMismatch
from eagle_rpc.evaluate import acceptance
from eagle_rpc.evaluate.acceptance import evaluate_draft
from eagle_rpc.serving.export import export_draft, load_export
from eagle_rpc.supervision import VocabMapping

AUX_LAYERS = (0, 2, 5)
PROMPTS = [[3, 7, 1], [2, 2, 5, 8], [6]]


def tiny_model(vocab_size=16):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def export(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("draft") / "export"
    config = Eagle3DraftConfig.from_target(model.config, draft_vocab_size=8)
    embedding = model.get_input_embeddings().weight
    draft = Eagle3Draft(config, embedding)
    draft.initialise(seed=0)
    export_draft(
        draft.state_dict(),
        config,
        VocabMapping.from_token_ids(torch.arange(0, 16, 2), 16),
        directory,
        dtype=torch.float32,
        aux_layer_ids=AUX_LAYERS,
        num_target_layers=6,
        target_embedding=embedding,
        bos_token_id=None,
        eos_token_id=None,
    )
    return load_export(directory)


def evaluate(model, export, prompts=PROMPTS, near_tie=1e-4, **settings):
    settings = {"max_new_tokens": 10, "num_draft_tokens": 2, "stop_ids": ()} | settings
    return evaluate_draft(model, export, prompts, near_tie=near_tie, **settings)


def test_the_summary_adds_up_its_prompts(model, export):
    result = evaluate(model, export)
    assert result.identical_texts and (result.differing_texts, result.near_ties) == (0, 0)
    assert result.num_prompts == len(result.prompts) == 3
    assert result.num_tokens == sum(row.tokens for row in result.prompts) == 30
    assert result.num_drafts == sum(row.num_drafts for row in result.prompts) > 0
    assert result.num_drafted == 2 * result.num_drafts
    for position, accepted in enumerate(result.accepted_per_position):
        assert accepted == sum(row.accepted_per_position[position] for row in result.prompts)
    assert result.accept_length == pytest.approx(1 + sum(result.accepted_per_position) / result.num_drafts)
    assert sum(result.acceptance_per_position) == pytest.approx(result.accept_length - 1)
    assert result.settings["aux_layer_ids"] == list(AUX_LAYERS)
    assert result.tokens_per_second == pytest.approx(30 / sum(row.seconds for row in result.prompts))


def test_the_file_holds_what_was_measured(model, export, tmp_path):
    result = evaluate(model, export)
    result.write(tmp_path / "evaluation.json")
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["accept_length"] == result.accept_length
    assert written["acceptance_per_position"] == result.acceptance_per_position
    assert written["num_drafts"] == result.num_drafts
    assert written["identical_texts"] is True
    assert [row["prompt_tokens"] for row in written["prompts"]] == [3, 4, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(("near_tie", "differing", "near_ties"), [(1e-4, 1, 0), (math.inf, 0, 1)])
def test_a_foreign_token_counts_against_the_draft_unless_it_was_a_near_tie(
    model, export, monkeypatch, near_tie, differing, near_ties
):
    decode = acceptance.decode_speculatively

    def spoiled(target, proposer, prompt_ids, **limits):
        token_ids, counts = decode(target, proposer, prompt_ids, **limits)
        if prompt_ids == PROMPTS[1]:
            token_ids[4] = (token_ids[4] + 1) % 16
        return token_ids, counts

    monkeypatch.setattr(acceptance, "decode_speculatively", spoiled)
    result = evaluate(model, export, near_tie=near_tie)
    assert (result.differing_texts, result.near_ties, result.identical_texts) == (
        differing,
        near_ties,
        differing == 0,
    )
    assert [row.identical for row in result.prompts] == [True, False, True]
    assert [row.difference for row in result.prompts] == [None, 4, None]
    assert result.prompts[1].margin > 1e-4
    assert result.prompts[0].margin is None


def test_texts_are_given_in_words_where_there_is_a_tokenizer(model, export):
    class Letters:
        def decode(self, ids):
            return "".join(chr(ord("a") + token) for token in ids)

    row = evaluate(model, export, tokenizer=Letters()).prompts[0]
    assert row.prompt == "dhb"
    assert len(row.text) == 10


def test_a_draft_of_another_target_is_refused(export):
    with pytest.raises(TargetMismatch, match=r"embedding \[V, H\] \[17, 32\], got \[16, 32\]"):
        evaluate(tiny_model(vocab_size=17), export)


@pytest.mark.parametrize(
    ("prompts", "message"), [([], "at least one prompt"), ([[1], [1] * 60], r"got 60 \+ 12")]
)
def test_prompts_are_checked_before_any_is_decoded(model, export, monkeypatch, prompts, message):
    monkeypatch.setattr(
        acceptance, "decode_greedily", lambda *args, **kwargs: pytest.fail("decoded a prompt")
    )
    with pytest.raises(ConfigError, match=message):
        evaluate(model, export, prompts=prompts)


def test_the_text_ends_at_the_models_own_stop_tokens_unless_others_are_given(model, export, monkeypatch):
    first = int(model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    monkeypatch.setattr(model.generation_config, "eos_token_id", [first, 0])
    assert evaluate(model, export, prompts=PROMPTS[:1], stop_ids=None).num_tokens == 1
    assert evaluate(model, export, prompts=PROMPTS[:1], stop_ids=()).num_tokens == 10
