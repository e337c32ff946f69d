"""Token ids of text that is tokenised in pieces are those of the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_tokenizer import make_tiny_tokenizer
from tokenizers import AddedToken

from eagle_rpc.data.pieces import PieceTokeniser


def with_tokens(*tokens: AddedToken):
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


TOKENIZERS = {
    "plain": make_tiny_tokenizer(),
    "one inside another": with_tokens(AddedToken("<a"), AddedToken("<a>"), AddedToken("b<a>")),
    "white space before a token": with_tokens(AddedToken("<left>", lstrip=True), AddedToken("<a>")),
    "white space behind a token": with_tokens(AddedToken("<right>", rstrip=True), AddedToken("<a>")),
    "a token of whole words": with_tokens(AddedToken("word", single_word=True)),
}
TEXTS = st.lists(
    st.sampled_from(["<a", "<a>", "b<a>", "<left>", "<right>", "word", "<|im_start|>", "<|im_end|>"])
    | st.sampled_from([" ", "\n", "  ", "a", "the sea", "\u00e9", "<", ">", "12"]),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_ids_are_those_of_the_whole_text(tokenizer, texts):
    tokenise = PieceTokeniser(tokenizer)
    for text in [*texts, "".join(texts)]:
        assert tokenise(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_turn_that_comes_again_is_not_tokenised_again(monkeypatch):
    tokenizer, read = make_tiny_tokenizer(), []
    whole = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **kw: (read.append(text), whole(self, text, **kw))[1]
    )
    tokenise = PieceTokeniser(tokenizer)
    first = "<|im_start|>user\nwhy is the sea so deep<|im_end|>\n"
    tokenise(first)
    read.clear()
    tokenise(first + "<|im_start|>assistant\n")
    assert read == ["<|im_start|>assistant\n"]
