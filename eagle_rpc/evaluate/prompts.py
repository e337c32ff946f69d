"""Prompts of an evaluation, read from a source of chats."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from eagle_rpc.config import Config
from eagle_rpc.data import ChatTemplate, Message, iter_chats
from eagle_rpc.data.problems import RecordProblem, RecordProblems, describe
from eagle_rpc.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the target reads it."""

    token_ids: list[int]
    category: str  # what its record says (`category` or `subject`), otherwise the name of its file


def read_prompts(config: Config, template: ChatTemplate, max_tokens: int) -> list[Prompt]:
    """The first `evaluate.num_prompts` usable prompts of `evaluate.prompts`.

    A prompt goes up to the answer to the last user turn of its chat, or to the first of several user turns
    that have no answer between them (MT-Bench). With the tokens to decode it must fit `max_tokens`, the
    target's context; one that does not is a broken record (`data.on_error`). Raises `DataError`.
    """
    settings, prompts = config.evaluate, list[Prompt]()
    room = max_tokens - settings.max_new_tokens - settings.num_draft_tokens
    problems = RecordProblems(config.data.on_error)
    for chat in iter_chats(settings.prompts, problems, needed_role="user"):
        with problems.record(chat.place):
            token_ids = template.prompt_ids(_asked(chat.messages), chat.tools)
            if len(token_ids) > room:
                raise RecordProblem(
                    f"the prompt must have at most {room} tokens, with the tokens to decode in a context of "
                    f"{max_tokens}, got {len(token_ids)}",
                    kind="longer than the context",
                )
            prompts.append(Prompt(token_ids, chat.category or Path(chat.place.rpartition(", ")[0]).stem))
        if len(prompts) == settings.num_prompts:
            break
    if not prompts:
        raise DataError(
            f"{settings.prompts} must hold a usable prompt, got none; {describe(problems.skipped)}"
        )
    if problems.skipped:
        logger.warning("%s: %d prompts, %s", settings.prompts, len(prompts), describe(problems.skipped))
    return prompts


def _asked(messages: Sequence[Message]) -> Sequence[Message]:
    """The turns up to the question."""
    for index, (message, following) in enumerate(pairwise(messages)):
        if message.role == following.role == "user":
            return messages[: index + 1]
    last = max(index for index, message in enumerate(messages) if message.role == "user")
    return messages[: last + 1]
