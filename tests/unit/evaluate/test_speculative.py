"""Legend: N tokens, H target hidden."""

from collections import Counter

import pytest
import torch
from replay_cases import sharpen_attention
from support.ttt_cases import every_slot
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from eagle_rpc.draft import DecodingCounts, Eagle3Draft, Eagle3DraftConfig, UnrollMemory
from eagle_rpc.errors import ConfigError
from eagle_rpc.evaluate.decoding.greedy import GreedyTarget
from eagle_rpc.evaluate.decoding.proposer import DraftProposer, Proposal
from eagle_rpc.evaluate.decoding.speculative import decode_greedily, decode_speculatively
from eagle_rpc.supervision import TargetShape, VocabMapping

VOCAB = 12
AUX_LAYERS = (1, 2, 3)
PROMPT = [3, 7, 1, 9, 4]


def tiny_target(config_class=LlamaConfig, seed=0, **settings):
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **settings},
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def tiny_draft(model, seed, likely_tokens):
    """A draft of a few tokens, so that chance alone makes some of its guesses right."""
    mapping = VocabMapping.from_token_ids(torch.tensor(likely_tokens), VOCAB)
    config = Eagle3DraftConfig.from_target(TargetShape.of(model.config), draft_vocab_size=len(mapping))
    draft = Eagle3Draft(config, model.get_input_embeddings().weight)
    draft.initialise(seed)
    sharpen_attention(draft)
    return draft, mapping


@torch.no_grad()
def greedy_text(model, prompt, length):
    """The model's own text, from whole forward passes without any cache."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class ScriptedProposer:
    """Guesses the next `right` tokens of the text, then wrong ones; records its arguments."""

    num_draft_tokens = 3

    def __init__(self, text, script):
        self.text, self.script = text, script

    def start(self):
        self.seen, self.aux, self.remaining = [], [], list(self.script)

    def propose(self, next_token_ids, aux_NW):
        assert len(next_token_ids) == len(aux_NW)
        self.seen += next_token_ids
        self.aux.append(aux_NW)
        known = len(self.seen) - len(PROMPT) + 1
        right = self.remaining.pop(0)
        following = self.text[known : known + self.num_draft_tokens]
        # After the first wrong guess the rest are the true tokens again, which must not count.
        guesses = [token if i != right else (token + 1) % VOCAB for i, token in enumerate(following)]
        return Proposal(guesses, [1.0] * len(guesses))


def decode_scripted(script, **limits):
    model = tiny_target()
    text = greedy_text(model, PROMPT, 30)
    proposer = ScriptedProposer(text, script)
    limits = {"max_new_tokens": 8, "stop_token_ids": ()} | limits
    decoding = decode_speculatively(GreedyTarget(model, AUX_LAYERS), proposer, PROMPT, **limits)
    assert decoding.token_ids == text[: len(decoding.token_ids)]
    return model, proposer, decoding.counts


def test_counts_of_a_case_worked_by_hand():
    # One token from the prompt, then 3 + 1, 0 + 1 and 1 + 1 tokens: eight.
    _, proposer, counts = decode_scripted([3, 0, 1])
    assert counts == DecodingCounts([2, 1, 1], num_drafts=3, num_texts=1, num_tokens=8)
    assert counts.num_drafted == 9
    assert proposer.remaining == []
    assert counts.accept_length == pytest.approx(1 + 4 / 3)
    assert counts.accept_length_within_text == pytest.approx(7 / 3)
    assert counts.acceptance_per_position == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert counts.conditional_acceptance_per_position == pytest.approx([2 / 3, 1 / 2, 1])


def test_a_proposer_that_is_always_right_gives_one_more_than_its_guesses():
    _, _, counts = decode_scripted([3] * 6, max_new_tokens=25)
    assert counts.accept_length == 4
    assert (counts.num_drafts, counts.num_tokens) == (6, 25)


def test_guesses_beyond_the_limit_count_but_are_not_text():
    _, _, counts = decode_scripted([3], max_new_tokens=3)
    assert counts == DecodingCounts([1, 1, 1], num_drafts=1, num_texts=1, num_tokens=3)
    assert (counts.accept_length, counts.accept_length_within_text) == (4, 2)


def test_nothing_is_drafted_when_the_prompt_alone_fills_the_text():
    _, _, counts = decode_scripted([], max_new_tokens=1)
    assert counts == DecodingCounts([0, 0, 0], num_drafts=0, num_texts=1, num_tokens=1)
    assert counts.accept_length == counts.accept_length_within_text == 1


@pytest.mark.parametrize(("place", "num_drafts"), [(0, 0), (2, 1), (4, 1)])
def test_a_stop_token_ends_the_text_wherever_it_is_accepted(place, num_drafts):
    model = tiny_target()
    text = greedy_text(model, PROMPT, 30)
    stop = {text[place]}
    end = text.index(text[place]) + 1
    assert end == place + 1, "the seed must give a text without repetition up to here"
    proposer = ScriptedProposer(text, [3])
    decoding = decode_speculatively(
        GreedyTarget(model, AUX_LAYERS), proposer, PROMPT, max_new_tokens=20, stop_token_ids=stop
    )
    assert decoding.token_ids == text[:end]
    assert (decoding.counts.num_tokens, decoding.counts.num_drafts) == (end, num_drafts)
    alone, _ = decode_greedily(
        GreedyTarget(model, AUX_LAYERS), PROMPT, max_new_tokens=20, stop_token_ids=stop
    )
    assert alone == text[:end]


def test_the_proposer_is_told_every_verified_token_once_with_the_hidden_states_before_it():
    model, proposer, _ = decode_scripted([3, 0, 1, 2], max_new_tokens=10)
    ids = [*PROMPT, *proposer.text][: len(proposer.seen) + 1]
    assert proposer.seen == ids[1:]
    with torch.no_grad():
        hidden_states = model(input_ids=torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
    expected_NW = torch.cat([hidden_states[layer + 1][0] for layer in AUX_LAYERS], dim=-1)
    torch.testing.assert_close(torch.cat(proposer.aux), expected_NW, rtol=1e-4, atol=1e-4)


def test_margins_are_the_distance_between_the_two_best_logits():
    model = tiny_target()
    alone, margins = decode_greedily(
        GreedyTarget(model, AUX_LAYERS), PROMPT, max_new_tokens=5, stop_token_ids=()
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPT, *alone]])).logits[0]
    best = logits[len(PROMPT) - 1 : -1].sort(dim=-1, descending=True).values
    assert margins == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-4)


@torch.no_grad()
def simulate_offline(model, draft, mapping, prompt, *, max_new_tokens, k):
    """Counts that decoding must give, from one forward of the target and the draft unrolled as in training.

    The finished text is fed to every step as training does; a guess at step i counts only when the ones
    before it were right, and then the text is what the chain would have fed.
    """
    text = greedy_text(model, prompt, max_new_tokens + k)
    ids = torch.tensor([[*prompt, *text]])
    hidden_states = model(input_ids=ids, output_hidden_states=True).hidden_states
    hidden = draft.fuse(torch.cat([hidden_states[layer + 1] for layer in AUX_LAYERS], dim=-1))
    memory, guesses = UnrollMemory(every_slot(ids.shape[1])), []
    positions = torch.arange(ids.shape[1])[None]
    for step in range(k):
        following = torch.zeros_like(ids)
        following[:, : -1 - step] = ids[:, 1 + step :]
        hidden = draft.advance(following, hidden, positions + step, memory)
        guesses.append(mapping.selected_token_ids[draft.lm_head(draft.norm(hidden))[0].argmax(dim=-1)])
    accepted_per_position, num_drafts, known = [0] * k, 0, 1
    while known < max_new_tokens:
        slot, accepted = len(prompt) + known - 2, 0
        while accepted < k and int(guesses[accepted][slot]) == text[known + accepted]:
            accepted_per_position[accepted] += 1
            accepted += 1
        num_drafts += 1
        known += accepted + 1
    return text[:max_new_tokens], num_drafts, accepted_per_position


def test_decoding_counts_what_the_trainers_view_of_the_draft_predicts():
    k, max_new_tokens = 3, 40
    total = [0] * k
    for seed in range(6):
        model = tiny_target(seed=seed)
        prompt = torch.randint(VOCAB, (4 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        frequent = Counter(greedy_text(model, prompt, max_new_tokens)).most_common(3)
        draft, mapping = tiny_draft(model, seed, [token for token, _ in frequent])
        text, num_drafts, accepted = simulate_offline(
            model, draft, mapping, prompt, max_new_tokens=max_new_tokens, k=k
        )
        decoding = decode_speculatively(
            GreedyTarget(model, AUX_LAYERS),
            DraftProposer(draft, mapping, k),
            prompt,
            max_new_tokens=max_new_tokens,
            stop_token_ids=(),
        )
        counts = decoding.counts
        assert decoding.token_ids == text
        assert (counts.num_drafts, counts.accepted_per_position) == (num_drafts, accepted)
        assert counts.num_drafted == k * num_drafts
        total = [sum(pair) for pair in zip(total, accepted, strict=True)]
    assert min(total) > 0, f"every position must be accepted somewhere, or the test shows little: {total}"


def test_a_proposer_starts_every_prompt_afresh():
    model = tiny_target()
    draft, mapping = tiny_draft(model, 0, [1, 5, 8])
    target, proposer = GreedyTarget(model, AUX_LAYERS), DraftProposer(draft, mapping, 3)
    runs = [
        decode_speculatively(target, proposer, PROMPT, max_new_tokens=20, stop_token_ids=()) for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_rejected_guesses_leave_a_sliding_window_whole():
    model = tiny_target(Gemma2Config, sliding_window=6, head_dim=8, attn_implementation="eager")
    draft, mapping = tiny_draft(model, 3, [1, 5, 8])
    decoding = decode_speculatively(
        GreedyTarget(model, AUX_LAYERS),
        DraftProposer(draft, mapping, 3),
        PROMPT,
        max_new_tokens=30,
        stop_token_ids=(),
    )
    assert decoding.token_ids == greedy_text(model, PROMPT, 30)
    assert decoding.counts.num_drafts > 7, "some guesses must be rejected"


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "at least one token"), ([1] * 120, r"context of 128 tokens, got 120 \+ 11")]
)
def test_prompts_that_cannot_be_decoded_are_refused(prompt, message):
    model = tiny_target()
    draft, mapping = tiny_draft(model, 0, [1, 5, 8])
    with pytest.raises(ConfigError, match=message):
        decode_speculatively(
            GreedyTarget(model, AUX_LAYERS),
            DraftProposer(draft, mapping, 3),
            prompt,
            max_new_tokens=8,
            stop_token_ids=(),
        )
