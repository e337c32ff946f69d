import torch
from support.tiny_tokenizer import make_tiny_tokenizer

from eagle_rpc.draft import Chains, TargetText
from eagle_rpc.evaluate.pieces import pieces_of

TOKENIZER = make_tiny_tokenizer()


def pieces(text, num_right, num_draft_tokens):
    ids = TOKENIZER(text)["input_ids"]
    right = (num_right * len(ids))[: len(ids) - 1]
    chains = Chains(num_right=right, margins_AS=torch.zeros(len(right), num_draft_tokens))
    target_text = TargetText(prompt_ids=[1], token_ids=ids)
    return ids, pieces_of(target_text, chains, TOKENIZER, num_draft_tokens)


def test_pieces_join_to_the_text_also_where_a_character_has_several_tokens():
    text = "the sea \U0001f30a is bleu — the end"
    ids, found = pieces(text, [1], 2)
    assert len(found) == len(ids)
    assert "".join(words for words, _ in found) == text == TOKENIZER.decode(ids)


def test_a_token_has_the_position_at_which_it_was_accepted_and_0_where_it_is_the_targets_own():
    _, found = pieces("abcdefgh" * 2, [2], 3)
    assert [position for _, position in found[:7]] == [0, 1, 2, 0, 1, 2, 0]
    _, bounded = pieces("abcdefgh" * 2, [2], 1)
    assert [position for _, position in bounded[:5]] == [0, 1, 0, 1, 0]


def test_guesses_beyond_the_end_of_the_text_have_no_piece():
    ids, found = pieces("ab", [3], 3)
    assert len(ids) == len(found) == 2
    assert [position for _, position in found] == [0, 1]
