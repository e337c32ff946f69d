"""Text as token ids, tokenised in the pieces between special tokens.

The prompt of each answer repeats all turns before it. Its pieces are remembered, so that the cost of a dialogue
does not grow with the square of its turns.
"""

import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

# More than the pieces of long dialogues; then the memory begins anew.
_REMEMBERED = 1024


class PieceTokeniser:
    """From text to ids, equal to those of the tokenizer, which adds no special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        # A token that takes white space before it, or is found in normalised text, begins no piece.
        begins = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if not (token.lstrip or token.normalized or token.single_word)
        ]
        # The longest of several tokens at one place, as tokenizers find it.
        by_length = sorted(begins, key=len, reverse=True)
        self._begin = re.compile("|".join(map(re.escape, by_length)) or "(?!)")
        probe = "".join(f" a b{begin}c D\n{begin} 12{begin}\n\ne{begin}" for begin in begins)
        if self(probe) != self._ids(probe):
            # This tokenizer does not read the text after a special token by itself.
            self._begin = re.compile("(?!)")

    def __call__(self, text: str) -> list[int]:
        """The token ids of `text`."""
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        ids: list[int] = []
        for piece in self._pieces(text):
            if piece not in self._known:
                self._known[piece] = self._ids(piece)
            ids += self._known[piece]
        return ids

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        for match in self._begin.finditer(text):
            if match.start() > start:
                yield text[start : match.start()]
                start = match.start()
        yield text[start:]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"])
