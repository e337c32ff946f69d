"""Chats as the text that a chat template makes of them."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date as Date
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from eagle_rpc.data.chats import Message
from eagle_rpc.data.problems import RecordProblem
from eagle_rpc.errors import ConfigError

# As transformers recognises the marker.
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Names under which templates read the thought of a turn.
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
# Keys of a turn that would change its content or its supervision if the template read them.
_TELLING_KEY = re.compile(
    r"mask|weight|loss|train|label|supervis|image|audio|video|function|thought|reason|think|tool(?!_call_id)"
)
# transformers gives templates the present day. This macro, put before a template, writes a given one.
_FIXED_DAY = (
    "{% macro strftime_now(format) %}{% set day = namespace(text=format) %}"
    "{% for code, value in eagle_rpc_day.items() %}"
    "{% set day.text = day.text.replace(code, value) %}{% endfor %}{{ day.text }}{% endmacro %}{{ '' }}"
)
_DAY_CODES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdDeFgGhHIjmMpSTuUVwWxXyYzZ"]


class ChatRenderer:
    """A chat template with the arguments of every rendering.

    `words` are the words in its `source`, names of variables among them; `identity` is all that its text
    depends on, as JSON values.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: str | None,
        arguments: Mapping[str, Any],
        day: str | None,
    ) -> None:
        """`path` is a Jinja file that replaces the tokenizer's template; `day` is ISO, null: today.

        Raises `ConfigError` if there is no template, or if it does not read one of `arguments`.
        """
        source = _own_template(tokenizer) if path is None else _read_template(path)
        self.words = frozenset(re.findall(r"\w+", source))
        for name in sorted(arguments.keys() - self.words):
            raise ConfigError(
                f"data.template_arguments.{name} must be a variable of the chat template, which does not read it"
            )
        self.has_markers = _GENERATION_MARKER.search(source) is not None and tokenizer.is_fast
        self._tokenizer, self.source, self._arguments = tokenizer, source, dict(arguments)
        if "strftime_now" in self.words:
            date = Date.today() if day is None else Date.fromisoformat(day)
            self.source = _FIXED_DAY + source
            self._arguments["eagle_rpc_day"] = {code: date.strftime(code) for code in _DAY_CODES}
        self.identity = [self.source, self._arguments]

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The rendering. Raises `RecordProblem` if the template refuses it or does not read a key."""
        return str(self._apply(messages, tools, tokenize=False, add_generation_prompt=add_generation_prompt))

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The prompt for an answer to `messages`. Raises `RecordProblem` also if it leaves out a turn or tools."""
        prompt = self.text(messages, tools, add_generation_prompt=True)
        if tools and "tools" not in self.words:
            raise RecordProblem(
                "the chat has tools, which the chat template does not render",
                kind="with tools that the template does not render",
            )
        for number, message in enumerate(messages, start=1):
            content = message.content.strip()
            as_json = json.dumps(content, ensure_ascii=False)[1:-1]
            if message.role != "assistant" and content not in prompt and as_json not in prompt:
                raise RecordProblem(
                    f"message {number} ({message.role}) is not rendered by the chat template",
                    kind="with a turn that the template leaves out",
                )
        return prompt

    def is_marked(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], start: int) -> bool:
        """Whether generation markers enclose a token from token `start` on; only with `has_markers`."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        return any(self._apply(messages, tools, **options)["assistant_masks"][start:])

    def _apply(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], **options: Any) -> Any:
        turns = [self._turn(message, number) for number, message in enumerate(messages, start=1)]
        try:
            return self._tokenizer.apply_chat_template(
                turns,
                tools=list(tools) or None,
                chat_template=self.source,
                **self._arguments,
                **options,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RecordProblem(
                f"the chat template refuses the chat: {error}", kind="refused by the template"
            ) from error

    def _turn(self, message: Message, number: int) -> dict[str, Any]:
        """A message as templates read it. Raises `RecordProblem` for a key that would change its meaning."""
        role = message.role
        if role == "developer" and role not in self.words:
            role = "system"
        turn: dict[str, Any] = {"role": role, "content": message.content}
        if message.thought is not None:
            turn |= {key: message.thought for key in _THOUGHT_KEYS if key in self.words}
        if message.tool_calls:
            turn["tool_calls"] = message.tool_calls
        for key, value in message.others.items():
            if key in self.words:
                turn[key] = value
            elif _TELLING_KEY.search(key):
                raise RecordProblem(
                    f"message {number} has the key {key}, which the chat template does not read",
                    kind=f"with the key {key}",
                )
        return turn


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
