"""Where a chat template puts the content of a user: the beginning from which a target writes a user's turn itself.

The method is Magpie's (arXiv 2406.08464): a chat model that is given its template up to a user's content goes
on as a user would.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from eagle_rpc.data.chats import Message
from eagle_rpc.data.problems import RecordProblem
from eagle_rpc.data.rendering import ChatRenderer
from eagle_rpc.errors import ConfigError

# Contents that no template holds. Two of them show which text does not depend on the content.
_CONTENTS = ("Ecktolar", "Zumpfrid")
_RULE = "data.prompt_source=self needs a chat template with a header before a user's content"


@dataclass(frozen=True, slots=True)
class UserTurn:
    """The text around a user's content, for a model that writes the content."""

    prompt_ids: list[int]  # the template's rendering up to the content
    end_id: int | None  # the token that ends the turn; None: a text ends it
    end_text: str | None  # text that ends the turn, if no token does before it
    marks: tuple[str, ...]  # texts of the template that no content holds


def find_user_turn(
    renderer: ChatRenderer,
    tokenise: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    ending_ids: Collection[int],
    system: str,
) -> UserTurn:
    """The first user turn of a chat; `ending_ids` are special tokens and stop tokens.

    Raises `ConfigError` if the template refuses the chat or if the content cannot be found in its rendering.
    """
    try:
        before, after = _around(renderer, system)
    except RecordProblem as problem:
        rule = "prompts.system cannot be used" if system else f"{_RULE}, got one that refuses a question"
        raise ConfigError(f"{rule}: {problem}") from problem
    # Words begin with their space in most vocabularies, so a space at the end would come twice.
    prompt_ids = tokenise(before.rstrip(" "))
    if not prompt_ids or not before.strip():
        raise ConfigError(f"{_RULE}, got none")
    after_ids = tokenise(after)
    end = next((index for index, token in enumerate(after_ids) if token in ending_ids), None)
    end_text = decode(after_ids[:end]).strip() or None
    if end is None and end_text is None:
        raise ConfigError(f"{_RULE} and a mark after it, got nothing after the content")
    lines = [line.strip() for line in (before + "\n" + after).splitlines()]
    marks = tuple(dict.fromkeys(line for line in lines if len(line) > 2 and not line.isalnum()))
    return UserTurn(prompt_ids, None if end is None else after_ids[end], end_text, marks)


def _around(renderer: ChatRenderer, system: str) -> tuple[str, str]:
    """The text before a user's content and the text after it. Raises `RecordProblem` and `ConfigError`."""
    messages = [Message("system", system)] if system else []
    found = set()
    for content in _CONTENTS:
        before, *after = renderer.prompt([*messages, Message("user", content)]).split(content)
        if len(after) != 1:
            raise ConfigError(f"{_RULE}, got one that writes the content {len(after)} times")
        found.add((before, after[0]))
    if len(found) > 1:
        raise ConfigError(f"{_RULE}, got a header that depends on the content")
    return found.pop()
