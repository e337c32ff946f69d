"""Chats as token ids, with a loss mask on the assistant's tokens.

There are two ways to find these tokens. A template with `{% generation %}` markers marks them. Without
markers, an assistant turn consists of the tokens that the rendering up to the turn's end adds to the
rendering of its prompt. That requires each of these renderings to be a prefix of the whole; chats where it is
not are refused (Qwen3's template, for example, removes earlier thoughts).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from eagle_rpc.data.chats import Message
from eagle_rpc.data.problems import RecordProblem
from eagle_rpc.errors import ConfigError

# As transformers recognises the marker.
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: str | None = None) -> None:
        """`path` is a Jinja file that replaces the tokenizer's template.

        Raises `ConfigError` if there is no template, or if it cannot be rendered.
        """
        self.tokenizer = tokenizer
        self._template = _own_template(tokenizer) if path is None else _read_template(path)
        self._marks_answers = _GENERATION_MARKER.search(self._template) is not None
        if self._marks_answers and not tokenizer.is_fast:
            raise ConfigError(
                "a template with generation markers must go with a fast tokenizer, "
                f"got {type(tokenizer).__name__}; give one without markers as data.chat_template"
            )
        self._special_ids = special_token_ids(tokenizer)
        try:
            self._render([Message("user", "Hello")], add_generation_prompt=True)
        except RecordProblem as problem:
            raise ConfigError(f"data.chat_template must render a question, got: {problem}") from problem

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt for the assistant's answer to `messages`. Raises `RecordProblem`."""
        return self._tokenise([self._render(messages, add_generation_prompt=True)])[0]

    def supervised_ids(
        self, messages: Sequence[Message], *, truncated: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a chat and their loss mask, both up to the last supervised token.

        The mask is true on the content of each assistant turn and on the token that ends the turn, not on
        white space that the template writes after it, which the target never emits. With generation markers
        the mask covers the marked text. A `truncated` chat loses the token that ends its last turn, since the
        target had not finished. Raises `RecordProblem` if the template refuses the chat or is not
        prefix-stable on it, or if no token is supervised.
        """
        ids, mask = self._marked_ids(messages) if self._marks_answers else self._ids_by_prefix(messages)
        # No token precedes the first one, so it cannot be predicted.
        if not any(mask[1:]):
            raise RecordProblem(
                "the template leaves no supervised token in the chat", kind="without supervised token"
            )
        length = len(mask) - mask[::-1].index(True)
        if truncated and ids[length - 1] in self._special_ids:
            length -= 1
        return ids[:length], mask[:length]

    def _marked_ids(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        encoded = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return encoded["input_ids"], [bool(marked) for marked in encoded["assistant_masks"]]

    def _ids_by_prefix(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Without the turns after the last answer."""
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        prompts = self._tokenise(
            [self._render(messages[:index], add_generation_prompt=True) for index in answers]
        )
        turns = self._tokenise([self._render(messages[: index + 1]) for index in answers])
        ids = turns[-1]
        mask = [False] * len(ids)
        for index, prompt, turn in zip(answers, prompts, turns, strict=True):
            if ids[: len(prompt)] != prompt or ids[: len(turn)] != turn:
                raise RecordProblem(
                    f"the chat template renders the chat up to message {index + 1} differently when more "
                    "messages follow, so the answer's tokens cannot be found; mark them with "
                    "{% generation %} in a template of your own (data.chat_template)",
                    kind="not prefix-stable",
                )
            for position in range(len(prompt), self._end_of_turn(turn, len(prompt))):
                mask[position] = True
        return ids, mask

    def _end_of_turn(self, turn: list[int], start: int) -> int:
        """End of a turn's supervision: after its last special token if only white space follows."""
        end = len(turn)
        while end > start and turn[end - 1] not in self._special_ids and self._is_space(turn[end - 1]):
            end -= 1
        return end if end > start and turn[end - 1] in self._special_ids else len(turn)

    def _is_space(self, token_id: int) -> bool:
        return str(self.tokenizer.decode([token_id])).isspace()

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        dicts = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(dicts, chat_template=self._template, **options)
        except TemplateError as error:
            raise RecordProblem(
                f"the chat template refuses the chat: {error}", kind="refused by the template"
            ) from error

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all special tokens: those with a role, and added tokens with the flag `special`."""
    flagged = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return flagged.union(tokenizer.all_special_ids)


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            "data.chat_template must name a Jinja file: "
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template"
        ) from error


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template must be a readable Jinja file, got {path!r}: {error}"
        ) from error
