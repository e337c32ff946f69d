import json
import math
from dataclasses import replace

import pytest
import torch
from evaluation_cases import AUX_LAYERS, PROMPTS, tiny_export, tiny_model

from eagle_rpc.config.choices import Guesses
from eagle_rpc.config.schema import EvaluateConfig
from eagle_rpc.draft import guess_chains, guess_trees
from eagle_rpc.errors import ConfigError, TargetMismatch
from eagle_rpc.evaluate import guesses
from eagle_rpc.evaluate.acceptance import evaluate_draft
from eagle_rpc.evaluate.decoding import judge
from eagle_rpc.evaluate.own_text import own_texts
from eagle_rpc.evaluate.speed import estimate_speed


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def export(model, tmp_path_factory):
    return tiny_export(model, tmp_path_factory.mktemp("draft") / "export")


def evaluate(model, export, prompts=PROMPTS, *, stop_ids=(), tokenizer=None, **settings):
    asked = EvaluateConfig(**{"max_new_tokens": 10, "num_draft_tokens": 2} | settings)
    return evaluate_draft(model, export, prompts, asked, stop_ids=stop_ids, tokenizer=tokenizer)


def test_the_summary_adds_up_its_prompts(model, export):
    result = evaluate(model, export, num_decoded=2)
    assert result.identical_texts and result.counts_agree
    assert (result.differing_texts, result.differing_counts, result.near_ties) == (0, 0, 0)
    assert result.num_prompts == len(result.prompts) == 3
    assert result.num_tokens == sum(row.tokens for row in result.prompts) == 30
    assert result.num_drafts == sum(row.num_drafts for row in result.prompts) > 0
    assert result.num_drafted == 2 * result.num_drafts
    for position, accepted in enumerate(result.accepted_per_position):
        assert accepted == sum(row.accepted_per_position[position] for row in result.prompts)
    assert result.accept_length == pytest.approx(1 + sum(result.accepted_per_position) / result.num_drafts)
    assert sum(result.acceptance_per_position) == pytest.approx(result.accept_length - 1)
    assert result.accept_length_within_text == pytest.approx(27 / result.num_drafts)
    low, high = result.accept_length_interval
    assert 1 <= low <= result.accept_length <= high <= 3
    assert list(result.accept_length_by_draft_tokens) == [1, 2]
    assert result.accept_length_by_draft_tokens[2] == result.accept_length
    assert result.settings["aux_layer_ids"] == list(AUX_LAYERS)
    decoded = [row.decoded for row in result.prompts]
    assert result.num_decoded == 2 and decoded[2] is None
    assert result.tokens_per_second == pytest.approx(20 / sum(row.seconds for row in decoded[:2]))
    for row in result.prompts[:2]:
        assert row.decoded.accepted_per_position == row.accepted_per_position


def test_the_file_holds_what_was_measured(model, export, tmp_path):
    result = evaluate(model, export)
    result.write(tmp_path / "evaluation.json")
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["accept_length"] == result.accept_length
    assert written["acceptance_per_position"] == result.acceptance_per_position
    assert written["num_drafts"] == result.num_drafts
    assert written["identical_texts"] is written["counts_agree"] is True
    assert [row["prompt_tokens"] for row in written["prompts"]] == [3, 4, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def differences(result):
    return result.differing_texts, result.differing_counts, result.near_ties


@pytest.mark.parametrize(("near_tie", "found"), [(1e-4, (1, 0, 0)), (math.inf, (0, 0, 1))])
def test_a_foreign_token_counts_against_the_draft_unless_it_was_a_near_tie(
    model, export, monkeypatch, near_tie, found
):
    decode = judge.decode_speculatively

    def spoiled(target, proposer, prompt_ids, **limits):
        decoding = decode(target, proposer, prompt_ids, **limits)
        if prompt_ids == PROMPTS[1]:
            decoding.token_ids[4] = (decoding.token_ids[4] + 1) % 16
        return decoding

    monkeypatch.setattr(judge, "decode_speculatively", spoiled)
    result = evaluate(model, export, near_tie=near_tie)
    assert differences(result) == found and result.counts_agree
    assert result.identical_texts is (found[0] == 0)
    assert [len(row.decoded.differences) for row in result.prompts] == [0, 1, 0]
    (difference,) = result.prompts[1].decoded.differences
    assert (difference.of, difference.token) == (judge.DECODED_TEXT, 4) and difference.margin > 1e-4


@pytest.mark.parametrize(("near_tie", "found"), [(1e-6, (0, 1, 0)), (math.inf, (0, 0, 1))])
def test_other_counts_than_those_of_real_decoding_are_told(model, export, monkeypatch, near_tie, found):
    def spoiled(draft, mapping, text, aux_TW, num_guesses, drawn):
        chains = guess_chains(draft, mapping, text, aux_TW, num_guesses, drawn)
        if text.prompt_ids == PROMPTS[2]:
            chains.num_right[0] = 0 if chains.num_right[0] else 1
        return chains

    monkeypatch.setattr(guesses, "guess_chains", spoiled)
    result = evaluate(model, export, near_tie=near_tie)
    assert differences(result) == found and result.identical_texts
    (difference,) = result.prompts[2].decoded.differences
    assert (difference.of, difference.token) == (judge.GUESSES, 1) and difference.margin > 1e-6
    assert ("DIFFER in 1 prompts" in result.summary()) is (not result.counts_agree) is (found[1] == 1)


def test_a_text_that_batches_change_is_told(model, export, monkeypatch):
    def changed(*args, **settings):
        first, *others = own_texts(*args, **settings)
        return [replace(first, token_ids=[*first.token_ids[:-1], 15 - first.token_ids[-1]]), *others]

    monkeypatch.setattr(guesses, "own_texts", changed)
    result = evaluate(model, export)
    (difference,) = result.prompts[0].decoded.differences
    assert (difference.of, difference.token) == (judge.BATCHED_TEXT, 9)
    assert differences(result) == (1, 0, 0) and not result.identical_texts


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
    monkeypatch.setattr(guesses, "own_texts", lambda *args, **kwargs: pytest.fail("decoded a prompt"))
    with pytest.raises(ConfigError, match=message):
        evaluate(model, export, prompts=prompts)


def test_the_text_ends_at_the_models_own_stop_tokens_unless_others_are_given(model, export, monkeypatch):
    first = int(model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    monkeypatch.setattr(model.generation_config, "eos_token_id", [first, 0])
    assert evaluate(model, export, prompts=PROMPTS[:1], stop_ids=None).num_tokens == 1
    assert evaluate(model, export, prompts=PROMPTS[:1], stop_ids=()).num_tokens == 10


@pytest.mark.parametrize("guesses_are", list(Guesses))
def test_texts_that_are_drawn_are_not_decoded_for_real(model, export, guesses_are):
    result = evaluate(model, export, temperature=1.0, guesses=guesses_are)
    assert (result.num_decoded, result.identical_texts, result.counts_agree) == (0, None, None)
    assert result.tokens_per_second is result.tokens_per_second_without_draft is None
    assert "none of texts that are drawn" in result.summary()
    assert result.settings["guesses"] == guesses_are.value and result.num_drafts > 0
    assert json.dumps(result.settings)
    assert result == evaluate(model, export, temperature=1.0, guesses=guesses_are)


def test_trees_are_counted_and_decoded_beside_chains_of_their_depth(model, export):
    tree = {"tree_nodes": 8, "tree_depth": 3, "tree_branching": 2}
    result, alone = evaluate(model, export, **tree), evaluate(model, export, num_draft_tokens=3)
    assert result.is_confirmed and result.tree.nodes_per_call == 8
    assert result.tree.chain_accept_length == pytest.approx(alone.accept_length)
    assert result.tree.gain == pytest.approx(result.tree.accept_length - alone.accept_length)
    assert result.tree.accept_length == pytest.approx(
        1 + sum(result.tree.accepted_per_depth) / result.tree.num_drafts
    )
    assert result.tree.by_category[""].num_drafts == result.tree.num_drafts
    decoded = result.tree_decoding.prompts
    assert sum(one.num_drafts for one in decoded) == result.tree.num_drafts
    assert [one.tokens for one in decoded] == [10, 10, 10]
    assert "tree  " in result.summary() and "over the chain" in result.summary()
    # The chain's own figures stay what they are without trees.
    plain = evaluate(model, export)
    assert (plain.tree, plain.tree_decoding) == (None, None)
    assert (result.accept_length, result.accepted_per_position) == (
        plain.accept_length,
        plain.accepted_per_position,
    )


@pytest.mark.parametrize(("near_tie", "found"), [(0.0, (0, 1, 0)), (math.inf, (0, 0, 1))])
def test_other_counts_of_trees_than_those_of_real_decoding_are_told(
    model, export, monkeypatch, near_tie, found
):
    def spoiled(draft, mapping, text, aux_TW, shape):
        trees = guess_trees(draft, mapping, text, aux_TW, shape)
        if text.prompt_ids == PROMPTS[2]:
            trees.num_right[0] = 0 if trees.num_right[0] else 1
        return trees

    monkeypatch.setattr(guesses, "guess_trees", spoiled)
    settings = {"tree_nodes": 8, "tree_depth": 3, "tree_branching": 2, "near_tie": near_tie}
    result = evaluate(model, export, **settings)
    assert differences(result.tree_decoding) == found and result.is_confirmed is (found[1] == 0)
    assert ("DIFFER in 1 prompts" in result.summary()) is (found[1] == 1)


def test_trees_over_drawn_texts_are_counted_and_not_decoded(model, export):
    result = evaluate(model, export, temperature=1.0, tree_nodes=8, tree_depth=3, tree_branching=2)
    assert result.tree.num_drafts > 0 and result.tree_decoding is None


def test_the_speed_at_each_batch_size_follows_from_times_and_accept_lengths(model, export):
    result = evaluate(model, export, batch_sizes=[1, 2])
    assert [one.times.batch_size for one in result.speed] == [1, 2]
    for one in result.speed:
        assert one == estimate_speed(one.times, result.accept_length_by_draft_tokens)
    # The prompts have 8 tokens together, the answers 10 each.
    assert result.speed[0].times.context == (8 + 3 * 5) // 3
    assert "batch 2, by draft tokens  1: " in result.summary()
