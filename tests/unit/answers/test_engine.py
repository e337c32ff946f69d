"""Batched answers are those that transformers gives one prompt at a time."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eagle_rpc.answers.engine import Answer, AnswerEngine
from eagle_rpc.errors import InvalidRequest

VOCAB = 64
MAX_NEW_TOKENS = 12
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "mistral": {"sliding_window": 6},
}


def random_model(model_type="llama"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **ARCHITECTURES[model_type])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def prompts(count, shared=(), longest=30):
    draw = random.Random(0)
    return [
        [*shared, *(draw.randrange(3, VOCAB) for _ in range(draw.randint(1, longest)))] for _ in range(count)
    ]


def reference_answer(model, prompt, stop_token_ids):
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=list(stop_token_ids),
        pad_token_id=0,
        use_cache=True,
    )[0, len(prompt) :].tolist()
    ended = ids[-1] in stop_token_ids
    return ids[:-1] if ended else ids, not ended


def answers_of(model, asked, *, batch_size=3, **settings):
    engine = AnswerEngine(
        model,
        batch_size=batch_size,
        max_new_tokens=MAX_NEW_TOKENS,
        **{"stop_token_ids": eos_ids(model, asked), **settings},
    )
    for number, prompt in enumerate(asked):
        engine.submit(str(number), prompt)
    found = {answer.key: answer for answer in engine.answers()}
    assert len(found) == len(asked)
    assert engine.num_generated == sum(
        len(answer.token_ids) + (not answer.truncated) for answer in found.values()
    )
    return [(found[str(number)].token_ids, found[str(number)].truncated) for number in range(len(asked))]


def eos_ids(model, asked):
    """Two tokens that the model says in the middle of an answer, so that answers end at different times."""
    said = reference_answer(model, asked[0], [VOCAB])[0]
    return {said[MAX_NEW_TOKENS // 2], reference_answer(model, asked[-1], [VOCAB])[0][-1]}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("shared", [(), (5, 9, 11, 7, 40)], ids=["nothing-shared", "shared-prefix"])
def test_greedy_answers_equal_those_of_transformers(model_type, shared):
    model = random_model(model_type)
    asked = prompts(11, shared)
    eos = eos_ids(model, asked)
    expected = [reference_answer(model, prompt, eos) for prompt in asked]
    assert {truncated for _, truncated in expected} == {True, False}
    assert answers_of(model, asked, stop_token_ids=eos) == expected


def test_the_model_is_left_with_its_own_attention():
    model = random_model()
    answers_of(model, prompts(2))
    assert model.config._attn_implementation == "eager"


def test_prompts_longer_than_the_cache_and_prompts_of_one_token_are_answered_alike():
    model = random_model()
    asked = [*prompts(2, longest=4), [7], *prompts(3, longest=180), [7, 8]]
    eos = {VOCAB}
    assert answers_of(model, asked, stop_token_ids=eos) == [
        reference_answer(model, prompt, eos) for prompt in asked
    ]


def test_prompts_submitted_while_others_are_answered_may_begin_otherwise_and_be_longer():
    model = random_model()
    first, later = prompts(4, shared=(5, 9, 11)), [[5, 9, *range(3, 60)] * 3, [60], [5, 9, 11, 12]]
    engine = AnswerEngine(model, batch_size=2, max_new_tokens=MAX_NEW_TOKENS, stop_token_ids={VOCAB})
    for number, prompt in enumerate(first):
        engine.submit(f"first {number}", prompt)
    found = {}
    for answer in engine.answers():
        if not found:
            for number, prompt in enumerate(later):
                engine.submit(f"later {number}", prompt)
        found[answer.key] = answer.token_ids
    assert len(found) == 7
    for kind, asked in (("first", first), ("later", later)):
        for number, prompt in enumerate(asked):
            assert found[f"{kind} {number}"] == reference_answer(model, prompt, {VOCAB})[0]


def test_sampled_answers_depend_on_seed_and_key_but_not_on_the_rest_of_the_batch():
    model, asked = random_model(), prompts(6)
    sample = {"temperature": 1.5, "stop_token_ids": {VOCAB}}
    together = answers_of(model, asked, batch_size=6, **sample)
    assert together == answers_of(model, asked, batch_size=1, **sample)
    assert together != answers_of(model, asked, batch_size=6, **sample, seed=1)
    same = answers_of(model, [asked[0], asked[0]], **sample)
    assert same[0] == together[0] != same[1]


def test_samples_follow_the_model_distribution():
    model, prompt, temperature = random_model(), prompts(1)[0], 2.0
    engine = AnswerEngine(
        model, batch_size=256, max_new_tokens=1, stop_token_ids={VOCAB}, temperature=temperature
    )
    count = 4096
    for number in range(count):
        engine.submit(str(number), prompt)
    seen = torch.zeros(VOCAB)
    for answer in engine.answers():
        seen[answer.token_ids[0]] += 1
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    # Five standard deviations of each count.
    assert bool(
        ((seen / count - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()
    )


def test_an_empty_prompt_is_refused():
    engine = AnswerEngine(random_model(), batch_size=1, max_new_tokens=1, stop_token_ids={1})
    with pytest.raises(InvalidRequest, match="prompt must hold at least one token"):
        engine.submit("a", [])


def test_an_end_of_turn_at_once_is_an_empty_answer():
    model = random_model()
    first = reference_answer(model, [5, 6], {VOCAB})[0][0]
    engine = AnswerEngine(model, batch_size=1, max_new_tokens=4, stop_token_ids={first})
    engine.submit("a", [5, 6])
    assert list(engine.answers()) == [Answer("a", [], truncated=False, stop_token=first)]


def test_answers_that_are_dropped_midway_leave_the_others_as_they_would_be():
    model, asked = random_model(), prompts(7)
    engine = AnswerEngine(model, batch_size=4, max_new_tokens=MAX_NEW_TOKENS, stop_token_ids={VOCAB})
    for number, prompt in enumerate(asked):
        engine.submit(str(number), prompt)
    assert engine.step() == []
    dropped = [engine._active[0].key, engine._active[2].key, engine._waiting[0].key]
    engine.drop(dropped)
    found = {answer.key: answer.token_ids for answer in engine.answers()}
    kept = {str(number): prompt for number, prompt in enumerate(asked) if str(number) not in dropped}
    assert found == {key: reference_answer(model, prompt, {VOCAB})[0] for key, prompt in kept.items()}
