"""Chats in which the target gives the answers: from them a draft learns how this target writes.

Each user turn is asked after the target's own earlier answers; assistant turns of the input are ignored.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from eagle_rpc.answers.answerer import Answer, Answerer
from eagle_rpc.answers.output import answer_settings, finished_prompts
from eagle_rpc.config import Config
from eagle_rpc.data import ChatTemplate, ChatWriter, Message, content_hash, read_chats
from eagle_rpc.data.problems import RecordProblems
from eagle_rpc.errors import ConfigError
from eagle_rpc.report.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Dialogue:
    """A chat whose answers are being made."""

    prompt: str  # hash of all system and user turns
    place: str
    coming: list[Message]  # system and user turns that the target has not been asked yet
    messages: list[Message] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Names the next answer; sampling depends on it."""
        return f"{self.prompt}/{len(self.messages)}"


class Regeneration:
    """One run over `regenerate.prompts`. `writer` is at the end of `regenerate.output`."""

    def __init__(
        self, config: Config, answerer: Answerer, template: ChatTemplate, writer: ChatWriter
    ) -> None:
        """Raises `ConfigError` if the target's context has no room for answers."""
        self._config = config.regenerate
        self._on_error = config.data.on_error
        self._template = template
        self._writer = writer
        self._settings = answer_settings(config, answerer.fingerprint)
        self._longest_prompt = longest_prompt(config, answerer.context)
        self._problems = RecordProblems(config.data.on_error)
        self._answerer = answerer
        self._asked: dict[str, _Dialogue] = {}
        self._counts: Counter[str] = Counter()

    def run(self) -> None:
        """Writes every chat that is not in the output yet.

        Raises `ConfigError` if the output was made with other settings, `DataError` for bad prompts.
        """
        done = finished_prompts(self._config.output, self._settings)
        dialogues = list(self._dialogues(done))
        logger.info("%d chats to ask, %d already in %s", len(dialogues), len(done), self._config.output)
        self._started = time.monotonic()
        self._progress = Progress("chat", len(dialogues))
        for dialogue in dialogues:
            self._continue(dialogue)
        for answer in self._answerer.answers():
            self._add_answer(self._asked.pop(answer.key), answer)
        self._progress.close()
        counts = ", ".join(
            f"{kind} {count}" for kind, count in (self._counts + self._problems.skipped).items()
        )
        logger.info("%s: %s", self._config.output, counts or "nothing new")

    def _dialogues(self, done: set[str]) -> Iterator[_Dialogue]:
        chats = read_chats(self._config.prompts, on_error=self._on_error, needed_role="user").chats
        known = set(done)
        for chat in chats[: self._config.num_prompts]:
            turns = [message for message in chat.messages if message.role != "assistant"]
            prompt = content_hash(turns)
            if prompt not in known:
                known.add(prompt)
                yield _Dialogue(prompt, chat.place, turns)

    def _continue(self, dialogue: _Dialogue) -> None:
        """Asks the next user turn, or writes the chat if there is none that can be asked."""
        while dialogue.coming:
            message = dialogue.coming.pop(0)
            dialogue.messages.append(message)
            if message.role == "user":
                if self._ask(dialogue):
                    return
                break
        self._write(dialogue)

    def _ask(self, dialogue: _Dialogue) -> bool:
        """Submits the chat so far, unless it is too long or the template refuses it."""
        with self._problems.record(dialogue.place):
            token_ids = self._template.prompt_ids(dialogue.messages)
            if len(token_ids) <= self._longest_prompt:
                self._asked[dialogue.key] = dialogue
                self._answerer.submit(dialogue.key, token_ids)
                return True
            self._counts[f"prompts over {self._longest_prompt} tokens"] += 1
        return False

    def _add_answer(self, dialogue: _Dialogue, answer: Answer) -> None:
        text = str(self._template.tokenizer.decode(answer.token_ids, skip_special_tokens=True))
        if answer.truncated:
            # The limit may cut through a character of several tokens.
            text = text.rstrip("\ufffd")
        if not text.strip():
            self._counts["empty answers"] += 1
            self._write(dialogue)
            return
        dialogue.messages.append(Message("assistant", text))
        if answer.truncated:
            # The chat ends here: the next user turn would follow an unfinished sentence.
            self._write(dialogue, truncated=True)
        else:
            self._continue(dialogue)

    def _write(self, dialogue: _Dialogue, *, truncated: bool = False) -> None:
        """Writes the chat up to its last answer, if it has one."""
        self._progress.advance(self._rate)
        messages = dialogue.messages
        while messages and messages[-1].role != "assistant":
            messages.pop()
        if messages:
            self._writer.write(messages, prompt=dialogue.prompt, settings=self._settings, truncated=truncated)
            self._counts["chats written"] += 1
            self._counts["chats truncated"] += truncated

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._answerer.num_generated / seconds:.0f} answer tokens/s"


def longest_prompt(config: Config, context: int | None) -> int:
    """Tokens of the longest prompt that is asked: with its answer it fits the target's context."""
    settings = config.regenerate
    if context is None:
        return settings.max_prompt_tokens
    if context <= settings.max_new_tokens:
        rule = f"regenerate.max_new_tokens must be less than the target's context {context}"
        raise ConfigError(f"{rule}, got {settings.max_new_tokens}")
    return min(settings.max_prompt_tokens, context - settings.max_new_tokens)
