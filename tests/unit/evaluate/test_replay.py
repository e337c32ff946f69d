"""What decoding accepts, from passes over the target's own texts: equal to real decoding in every count."""

import pytest
from replay_cases import AUX_LAYERS, CONTEXT, FAMILIES, FORMS, VOCAB, random_prompts, tiny_draft, tiny_target

from eagle_rpc.draft import DecodingCounts, guess_chains, replay
from eagle_rpc.evaluate.decoding.greedy import GreedyTarget
from eagle_rpc.evaluate.decoding.proposer import DraftProposer
from eagle_rpc.evaluate.decoding.speculative import decode_speculatively
from eagle_rpc.evaluate.own_text import captured_states, own_texts

LONGEST = 5


def compare(model, prompts, seed, *, max_new_tokens, stop_ids=(), shortest=LONGEST, **form):
    """Asserts equal texts and drafts of `shortest` to `LONGEST` guesses; returns the counts of the longest."""
    limits = {"max_new_tokens": max_new_tokens, "stop_token_ids": stop_ids}
    texts = own_texts(model, prompts, batch_size=3, tokens_after_end=LONGEST - 1, **limits)
    draft, mapping = tiny_draft(model, seed, texts, **form)
    target, total = GreedyTarget(model, AUX_LAYERS), DecodingCounts([0] * LONGEST)
    for index, aux_TW in captured_states(model, AUX_LAYERS, texts):
        text = texts[index]
        chains = guess_chains(draft, mapping, text, aux_TW, LONGEST)
        for k in range(shortest, LONGEST + 1):
            decoding = decode_speculatively(
                target, DraftProposer(draft, mapping, k), prompts[index], **limits
            )
            assert decoding.token_ids == list(text.token_ids)
            assert decoding.accepted == replay(chains.num_right, k)
        total.add(decoding.counts)
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_every_draft_of_every_length_accepts_what_real_decoding_accepts(family):
    prompts = random_prompts(0, (1, 4, 9, 9, 30))
    counts = compare(tiny_target(family, 0), prompts, 0, max_new_tokens=24, shortest=1)
    assert min(counts.accepted_per_position[:2]) > 0, f"some guesses must be accepted: {counts}"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_draft_accepts_what_real_decoding_accepts(form):
    prompts = random_prompts(0, (1, 4, 9, 30))
    counts = compare(tiny_target("llama", 0), prompts, 0, max_new_tokens=24, **FORMS[form])
    assert min(counts.accepted_per_position[:2]) > 0, f"some guesses must be accepted: {counts}"


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_texts_may_end_anywhere_and_guesses_behind_their_ends_count(family):
    model, prompts = tiny_target(family, 1), random_prompts(1, (2, 5, 5))
    counts = [compare(model, prompts, 1, max_new_tokens=12, stop_ids={stop}) for stop in range(VOCAB)]
    assert len({one.num_tokens for one in counts}) > 4
    assert any(one.accept_length - one.accept_length_within_text > 1e-9 for one in counts)


def test_texts_may_reach_the_end_of_the_context():
    model = tiny_target("llama", 0)
    compare(model, random_prompts(0, (CONTEXT - 20 - LONGEST, 7)), 0, max_new_tokens=20)


def test_a_text_of_one_token_has_no_draft():
    model = tiny_target("llama", 0)
    assert compare(model, random_prompts(0, (1, 3)), 0, max_new_tokens=1).num_drafts == 0


def test_many_chains_are_guessed_in_parts(monkeypatch):
    monkeypatch.setattr("eagle_rpc.draft.chains._CHAINS", 7)
    compare(tiny_target("llama", 1), random_prompts(1, (3, 20)), 1, max_new_tokens=30)


def test_a_shorter_draft_is_the_beginning_of_a_longer_one():
    assert replay([3, 0, 0, 1, 0, 2, 9], 8) == [3, 0, 2]
    assert replay([3, 0, 0, 1, 0, 2, 9], 2) == [2, 1, 2]
    assert replay([], 3) == []
