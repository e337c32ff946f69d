"""Trees of guesses: the same text, and over the target's own texts the counts of real decoding."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from replay_cases import AUX_LAYERS, FAMILIES, FORMS, VOCAB, random_prompts, tiny_draft, tiny_target

from eagle_rpc.draft import DecodingCounts, TreeShape, grow_trees, guess_chains, guess_trees, replay
from eagle_rpc.draft.chains import read_text
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.evaluate.decoding.trees import TreeProposer, TreeTarget, decode_with_trees
from eagle_rpc.evaluate.own_text import captured_states, own_texts

LIMITS = {"max_new_tokens": 24, "stop_token_ids": ()}
SHAPES = [
    TreeShape(depth=4, branching=2, nodes=8),
    TreeShape(depth=3, branching=3, nodes=21),
    TreeShape(depth=5, branching=3, nodes=9),
]


def guessed(model, seed, lengths=(1, 4, 9, 30), tokens_after_end=4, **form):
    """Draft, mapping, and each text with its captured states."""
    prompts = random_prompts(seed, lengths)
    texts = own_texts(model, prompts, batch_size=3, tokens_after_end=tokens_after_end, **LIMITS)
    draft, mapping = tiny_draft(model, seed, texts, **form)
    return (
        draft,
        mapping,
        [(texts[index], aux_TW) for index, aux_TW in captured_states(model, AUX_LAYERS, texts)],
    )


def counts_of(shape, trees_of_texts):
    counts = DecodingCounts([0] * shape.depth)
    for text, trees in trees_of_texts:
        accepted = replay(trees.num_right, shape.depth)
        counts.add(DecodingCounts.of_text(accepted, shape.depth, len(text.token_ids)))
    return counts


def assert_real_decoding_agrees(model, seed, shape, **form):
    draft, mapping, texts = guessed(model, seed, **form)
    target, proposer = TreeTarget(model, AUX_LAYERS), TreeProposer(draft, mapping, shape)
    deepest = 0
    for text, aux_TW in texts:
        trees = guess_trees(draft, mapping, text, aux_TW, shape)
        decoding = decode_with_trees(target, proposer, text.prompt_ids, **LIMITS)
        assert decoding.token_ids == list(text.token_ids)
        assert decoding.accepted == replay(trees.num_right, shape.depth)
        deepest = max(deepest, *decoding.accepted)
    assert deepest > 1, "some paths must be accepted"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_real_decoding_gives_the_targets_text_and_the_counts_of_its_text(family, shape):
    assert_real_decoding_agrees(tiny_target(family, 0), 0, shape)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_draft_gives_the_counts_of_real_decoding(form):
    assert_real_decoding_agrees(tiny_target("llama", 0), 0, SHAPES[0], **FORMS[form])


def test_a_tree_without_branches_is_the_chain():
    draft, mapping, texts = guessed(tiny_target("llama", 0), 0)
    for text, aux_TW in texts:
        for depth in (1, 3, 5):
            chains = guess_chains(draft, mapping, text, aux_TW, depth)
            trees = guess_trees(
                draft, mapping, text, aux_TW, TreeShape(depth=depth, branching=1, nodes=depth)
            )
            assert trees.num_right == chains.num_right and trees.num_nodes == depth


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_accepts_more_than_the_chain_of_its_depth(seed):
    shape = TreeShape(depth=4, branching=3, nodes=16)
    draft, mapping, texts = guessed(tiny_target("llama", seed), seed)
    chain = TreeShape(depth=4, branching=1, nodes=4)
    wide, narrow = (
        counts_of(one, [(text, guess_trees(draft, mapping, text, aux, one)) for text, aux in texts])
        for one in (shape, chain)
    )
    assert wide.accept_length > narrow.accept_length
    assert wide.num_drafts < narrow.num_drafts and wide.num_tokens == narrow.num_tokens


def test_many_trees_are_grown_in_parts(monkeypatch):
    draft, mapping, texts = guessed(tiny_target("llama", 1), 1)
    whole = [guess_trees(draft, mapping, *one, SHAPES[0]).num_right for one in texts]
    monkeypatch.setattr("eagle_rpc.draft.trees._ROWS", 7)
    assert [guess_trees(draft, mapping, *one, SHAPES[0]).num_right for one in texts] == whole


def slow_tree(draft, mapping, text, aux_TW, slot, shape):
    """Paths of target ids in the tree from a slot; each path is decoded alone, after the whole text before it."""
    ids = text.ids

    def said(path):
        """Log-probabilities after the text up to the slot and this path."""
        cache = draft.new_cache()
        carried, logits = draft.decode_step(
            torch.tensor([ids[1 : slot + 2]]), draft.fuse(aux_TW[None, : slot + 1]), cache
        )
        for token in path:
            carried, logits = draft.decode_step(torch.tensor([[token]]), carried[:, -1:], cache)
        return logits[0].log_softmax(-1)

    def children(path, score):
        best = said(path).topk(min(shape.branching, len(mapping)))
        ids = mapping.selected_token_ids[best.indices].tolist()
        return [((*path, token), score + float(value)) for token, value in zip(ids, best.values, strict=True)]

    candidates, frontier = [], [((), 0.0)]
    for _ in range(shape.depth):
        level = [child for path, score in frontier for child in children(path, score)]
        candidates += level
        frontier = sorted(level, key=lambda one: -one[1])[: shape.branching]
    return {path for path, _ in sorted(candidates, key=lambda one: -one[1])[: shape.nodes]}


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_has_the_likeliest_paths_of_a_beam_as_eagle_2_has(shape):
    draft, mapping, texts = guessed(tiny_target("llama", 2), 2, lengths=(4,))
    text, aux_TW = texts[0]
    slots, output_TH, cache = read_text(draft, text, torch.tensor(text.ids), aux_TW)
    trees = grow_trees(draft, mapping, cache, slots, output_TH[slots], shape)
    for place, slot in enumerate(slots.tolist()):
        tokens, parents = trees.token_ids_AN[place].tolist(), trees.parents_AN[place].tolist()
        paths = [()]
        for token, parent in zip(tokens, parents, strict=True):
            paths.append((*paths[parent], token))
        assert set(paths[1:]) == slow_tree(draft, mapping, text, aux_TW, slot, shape)
        assert [len(path) for path in paths[1:]] == trees.depths_AN[place].tolist()
        assert all(earlier <= later for earlier, later in pairwise(trees.depths_AN[place].tolist()))


def test_guesses_beyond_the_known_text_are_wrong():
    model, shape = tiny_target("llama", 0), SHAPES[1]
    draft, mapping, texts = guessed(model, 0, tokens_after_end=0)
    for text, aux_TW in texts:
        num_right = guess_trees(draft, mapping, text, aux_TW, shape).num_right
        assert all(right <= left for right, left in zip(num_right[::-1], range(1, 99), strict=False))


def test_a_text_of_one_token_has_no_tree():
    model = tiny_target("llama", 0)
    draft, mapping, texts = guessed(model, 0)
    short = replace(texts[0][0], token_ids=texts[0][0].token_ids[:1], after_end=())
    assert guess_trees(draft, mapping, short, texts[0][1], SHAPES[0]).num_right == []


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama", "qwen3"}))
def test_a_target_that_does_not_read_trees_exactly_is_refused(family):
    with pytest.raises(UnsupportedTarget, match="to verify trees"):
        TreeTarget(tiny_target(family, 0), AUX_LAYERS)


def test_every_token_of_the_vocabulary_may_be_a_child():
    model = tiny_target("llama", 0)
    shape = TreeShape(depth=2, branching=VOCAB, nodes=VOCAB)
    draft, mapping, texts = guessed(model, 0)
    trees = guess_trees(draft, mapping, *texts[0], shape)
    assert trees.num_nodes == len(mapping) + len(mapping) ** 2
