"""Guesses at a temperature, judged by speculative sampling as it is written down, one guess at a time."""

from collections import Counter

import pytest
import torch
from test_replay import VOCAB, random_prompts, tiny_draft, tiny_target

from eagle_rpc.draft import DecodingCounts, DrawnGuesses, guess_chains, replay
from eagle_rpc.draft.attention_memory import DraftCache
from eagle_rpc.evaluate.decoding.greedy import GreedyTarget
from eagle_rpc.evaluate.own_text import captured_states, log_probs, own_texts

AUX_LAYERS = (1, 2, 3)
TEMPERATURE, GUESSES = 1.5, 3


class SampledDecoder:
    """Speculative sampling (arXiv:2211.17192, algorithm 1) of one prompt after the other."""

    def __init__(self, model, draft, mapping, seed):
        self._target, self._draft = GreedyTarget(model, AUX_LAYERS), draft
        self._ids_K = mapping.selected_token_ids
        self._generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def decode(self, prompt_ids, max_new_tokens):
        """The token ids, and the accepted guesses of each draft."""
        self._target.start()
        cache, accepted = DraftCache(), []
        step = self._target.read(prompt_ids, predictions=1)
        token_ids, aux_NW = [self._draw(self._probabilities(step.logits_PV[-1]))], step.aux_NW
        successors = [*prompt_ids[1:], *token_ids]
        while len(token_ids) < max_new_tokens:
            guesses, guessed = self._propose(successors, aux_NW, cache)
            step = self._target.read([token_ids[-1], *guesses], predictions=GUESSES + 1)
            right = 0
            while right < GUESSES and self._accepts(step.logits_PV[right], guessed[right], guesses[right]):
                right += 1
            said = self._probabilities(step.logits_PV[right])
            if right < GUESSES:
                said = (said - guessed[right]).clamp(min=0)
            self._target.keep(len(prompt_ids) + len(token_ids) + right)
            successors, aux_NW = [*guesses[:right], self._draw(said)], step.aux_NW[: right + 1]
            token_ids += successors
            accepted.append(right)
        return token_ids[:max_new_tokens], accepted

    def _propose(self, successors, aux_NW, cache):
        """Guesses, and the distribution [V] from which each was drawn."""
        ids, hidden, verified = (
            list(successors),
            self._draft.fuse(aux_NW[None]),
            cache.length + len(successors),
        )
        guesses, distributions = [], []
        for _ in range(GUESSES):
            hidden, logits_1K = self._draft.decode_step(torch.tensor([ids]), hidden, cache)
            hidden = hidden[:, -1:]
            guessed = torch.zeros(VOCAB).index_put((self._ids_K,), self._probabilities(logits_1K.flatten()))
            ids = [self._draw(guessed)]
            guesses += ids
            distributions.append(guessed)
        cache.truncate(verified)
        return guesses, distributions

    def _accepts(self, logits_V, guessed_V, guess):
        ratio = float(self._probabilities(logits_V)[guess] / guessed_V[guess])
        return float(torch.rand((), generator=self._generator)) < ratio

    def _probabilities(self, logits):
        return (logits.float() / TEMPERATURE).softmax(dim=-1)

    def _draw(self, weights):
        return int(weights.multinomial(1, generator=self._generator))


@pytest.fixture(scope="module")
def case():
    model = tiny_target("llama", seed=3)
    texts = own_texts(
        model,
        random_prompts(4, [5] * 4),
        batch_size=4,
        max_new_tokens=20,
        stop_token_ids=(),
        tokens_after_end=0,
    )
    draft, mapping = tiny_draft(model, 5, texts)
    return model, draft, mapping


def drawn_texts(model, num_texts, num_tokens):
    return own_texts(
        model,
        random_prompts(7, [5] * num_texts),
        batch_size=64,
        max_new_tokens=num_tokens,
        stop_token_ids=(),
        tokens_after_end=GUESSES - 1,
        temperature=TEMPERATURE,
    )


def chains_of(case, texts, num_guesses=GUESSES):
    model, draft, mapping = case
    for index, aux_TW in captured_states(model, AUX_LAYERS, texts):
        drawn = DrawnGuesses(
            temperature=TEMPERATURE,
            log_probs_T=log_probs(model, texts[index], TEMPERATURE),
            generator=torch.Generator().manual_seed(index),
        )
        yield texts[index], aux_TW, guess_chains(draft, mapping, texts[index], aux_TW, num_guesses, drawn)


def test_speculative_sampling_draws_from_the_targets_distribution(case):
    model = case[0]
    decoder, prompt = SampledDecoder(*case, seed=11), [3, 1, 4]
    num_draws = 500
    drawn = Counter(tuple(decoder.decode(prompt, 2)[0]) for _ in range(num_draws))
    first = (model(torch.tensor([prompt])).logits[0, -1] / TEMPERATURE).softmax(-1)
    after = torch.tensor([[*prompt, token] for token in range(VOCAB)])
    second = (model(after).logits[:, -1] / TEMPERATURE).softmax(-1)
    expected = {
        (one, two): float(first[one] * second[one, two]) * num_draws
        for one in range(VOCAB)
        for two in range(VOCAB)
    }
    frequent = [pair for pair, number in expected.items() if number >= 5]
    seen, foreseen = [drawn[pair] for pair in frequent], [expected[pair] for pair in frequent]
    seen.append(num_draws - sum(seen))
    foreseen.append(num_draws - sum(foreseen))
    assert len(frequent) > 8
    statistic = sum((one - other) ** 2 / other for one, other in zip(seen, foreseen, strict=True))
    freedom = len(seen) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, "chi-squared, four deviations above its mean"


def test_passes_over_drawn_texts_accept_as_often_as_speculative_sampling(case):
    counts, decoder = DecodingCounts([0] * GUESSES), SampledDecoder(*case, seed=12)
    texts = drawn_texts(case[0], 400, 16)
    for text, _, chains in chains_of(case, texts):
        counts.add(DecodingCounts.of_text(replay(chains.num_right, GUESSES), GUESSES, len(text.token_ids)))
    real = DecodingCounts([0] * GUESSES)
    for text in texts[:50]:
        token_ids, accepted = decoder.decode(text.prompt_ids, 16)
        real.add(DecodingCounts.of_text(accepted, GUESSES, len(token_ids)))
    for share, real_share in zip(counts.acceptance_per_position, real.acceptance_per_position, strict=True):
        error = (share * (1 - share) * (1 / counts.num_drafts + 1 / real.num_drafts)) ** 0.5
        assert abs(share - real_share) < 4 * error
    assert 0.05 < counts.acceptance_per_position[0] < 0.95


def test_the_first_guess_is_accepted_with_the_analytical_probability(case):
    model, draft, mapping = case
    right, overlap, places = 0, 0.0, 0
    for text, aux_TW, chains in chains_of(case, drawn_texts(model, 500, 24), num_guesses=1):
        ids = torch.tensor([text.ids])
        said = (model(ids).logits[0] / TEMPERATURE).softmax(-1)
        slots = torch.arange(ids.shape[1] - 1)[None]
        output = draft.advance(ids[:, 1:], draft.fuse(aux_TW[None, :-1]), slots, DraftCache())[0]
        guessed = (draft.lm_head(draft.norm(output)) / TEMPERATURE).softmax(-1)
        begin = len(text.prompt_ids) - 1
        for place, num_right in enumerate(chains.num_right, start=begin):
            said_K = said[place + 1, mapping.selected_token_ids]
            overlap += float(torch.minimum(said_K, guessed[place]).sum())
            right, places = right + num_right, places + 1
    assert places > 10_000
    assert right / places == pytest.approx(overlap / places, abs=0.01)


def test_the_likeliest_guess_is_right_where_the_target_draws_it(case):
    model, draft, mapping = case
    texts = drawn_texts(model, 40, 16)
    for index, aux_TW in captured_states(model, AUX_LAYERS, texts):
        chains = guess_chains(draft, mapping, texts[index], aux_TW, 1)
        decoded = [bool(one) for one in chains.num_right]
        ids = torch.tensor([texts[index].ids])
        slots = torch.arange(ids.shape[1] - 1)[None]
        output = draft.advance(ids[:, 1:], draft.fuse(aux_TW[None, :-1]), slots, DraftCache())[0]
        guesses = mapping.selected_token_ids[draft.lm_head(draft.norm(output)).argmax(-1)]
        begin = len(texts[index].prompt_ids) - 1
        assert decoded == [
            int(guesses[place]) == int(ids[0, place + 2]) for place in range(begin, begin + len(decoded))
        ]
