"""What decoding accepts, from passes over the target's own texts: equal to real decoding in every count."""

from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eagle_rpc.draft import DecodingCounts, Eagle3Draft, Eagle3DraftConfig, guess_chains, replay
from eagle_rpc.evaluate.greedy import GreedyTarget
from eagle_rpc.evaluate.own_text import captured_states, own_texts
from eagle_rpc.evaluate.proposer import DraftProposer
from eagle_rpc.evaluate.speculative import decode_speculatively
from eagle_rpc.supervision import VocabMapping

VOCAB, CONTEXT, LONGEST = 12, 96, 5
AUX_LAYERS = (1, 2, 3)
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
    "bloom": {"n_layer": 6, "n_head": 4},
}


def tiny_target(model_type, seed):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.5,
    }
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, **{**sizes, **tokens, **FAMILIES[model_type]})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def tiny_draft(model, seed, texts, **form):
    """A draft of the texts' three most frequent tokens, so that chance alone makes some guesses right."""
    frequent = Counter(token for text in texts for token in text.token_ids).most_common(3)
    mapping = VocabMapping.from_token_ids(torch.tensor([token for token, _ in frequent]), VOCAB)
    config = Eagle3DraftConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        draft_vocab_size=len(mapping),
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=CONTEXT,
        **form,
    )
    draft = Eagle3Draft(config, model.get_input_embeddings().weight)
    draft.initialise(seed)
    for name, weight in draft.named_parameters():
        # Guesses then hang on what the draft attends to.
        if weight.requires_grad and "norm" not in name and name != "fc.weight":
            weight.data.mul_(60 if "o_proj" in name else 15)
    return draft, mapping


def random_prompts(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


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


FORMS = {
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "norm_before_fc": {"norm_before_fc": True, "norm_before_residual": True},
    "two_layers": {"num_layers": 2, "norm_output": True},
    "window": {"sliding_window": 6},
    "window_shorter_than_the_guesses": {"sliding_window": 3, "num_layers": 2},
}


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
