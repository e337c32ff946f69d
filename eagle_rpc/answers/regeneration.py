"""Chats in which the target gives the answers: from them a draft learns how this target writes.

Each user turn is asked after the target's own earlier answers; assistant turns of the input are ignored. The
ids that were asked and said are kept, and training uses them as they are.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from eagle_rpc.answers.answerer import Answer, Answerer, answers_under_way
from eagle_rpc.answers.output import AnswerFile, RegeneratedChat, answer_settings
from eagle_rpc.config import Config
from eagle_rpc.data import ChatTemplate, KeptAnswer, Message, content_hash, read_chats
from eagle_rpc.data.problems import RecordProblem, RecordProblems
from eagle_rpc.report.progress import Progress
from eagle_rpc.supervision import tokenizer_fingerprint

logger = logging.getLogger(__name__)

# Share of cut answers above which the log says how to avoid them.
_MANY_CUT = 0.1


@dataclass(slots=True)
class _Dialogue:
    """A chat whose answers are being made."""

    prompt: str  # hash of all turns that are asked
    number: int  # of several dialogues of one prompt
    place: str
    coming: list[Message]  # turns that the target has not been asked yet
    tools: list[dict[str, Any]]
    messages: list[Message] = field(default_factory=list)
    answers: list[KeptAnswer] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)  # the prompt that is being answered

    @property
    def key(self) -> str:
        """Names the next answer; sampling depends on it."""
        return f"{self.prompt}/{self.number}/{len(self.messages)}"


class Regeneration:
    """One run over `regenerate.prompts`."""

    def __init__(
        self, config: Config, answerer: Answerer, template: ChatTemplate, output: AnswerFile, *, date: str
    ) -> None:
        """`date`: the day that the template writes. Raises `ConfigError` for an output of other settings."""
        asked = self._config = config.regenerate
        self._on_error = config.data.on_error
        self._template = template
        self._output = output
        self._settings = answer_settings(config, target=answerer.fingerprint, template=template.identity)
        output.require_settings(self._settings)
        self._origin: dict[str, Any] = {
            "settings": self._settings,
            "tokenizer": tokenizer_fingerprint(template.tokenizer),
            "date": date,
        }
        self._longest_prompt, longest_answer = limits(config, answerer.context)
        if (self._longest_prompt, longest_answer) != (asked.max_prompt_tokens, asked.max_new_tokens):
            logger.info(
                "the target's context of %s tokens has room for prompts of %d and answers of %d tokens",
                answerer.context,
                self._longest_prompt,
                longest_answer,
            )
        self._problems = RecordProblems(config.data.on_error)
        self._answerer = answerer
        self._asked: dict[str, _Dialogue] = {}
        self._counts: Counter[str] = Counter()
        self._finished = self._finished_tokens = 0

    def run(self) -> None:
        """Writes every chat that is not in the output yet. Raises `DataError` for bad prompts."""
        dialogues = list(self._dialogues())
        done = len(self._output.finished)
        logger.info("%d chats to ask, %d already in %s", len(dialogues), done, self._config.output)
        self._started = time.monotonic()
        self._progress = Progress("chat", len(dialogues), title="regenerating")
        for dialogue in dialogues:
            self._continue(dialogue)
        for answer in self._answerer.answers():
            self._finished += 1
            self._finished_tokens += len(answer.said_ids)
            self._add_answer(self._asked.pop(answer.key), answer)
        self._progress.close()
        counts = ", ".join(
            f"{kind} {count}" for kind, count in (self._counts + self._problems.skipped).items()
        )
        logger.info("%s: %s", self._config.output, counts or "nothing new")
        self._warn_of_cut_answers()

    def _warn_of_cut_answers(self) -> None:
        answers, cut = self._counts["answers"], self._counts["answers cut"]
        if cut > _MANY_CUT * answers:
            logger.warning(
                "%.0f %% of the answers were cut at %d tokens, so the draft sees few ends of answers: raise "
                "regenerate.max_new_tokens",
                100 * cut / answers,
                self._config.max_new_tokens,
            )

    def _dialogues(self) -> Iterator[_Dialogue]:
        chats = read_chats(self._config.prompts, on_error=self._on_error, needed_role="user").chats
        known = set(self._output.finished)
        for chat in chats[: self._config.num_prompts]:
            turns = [message for message in chat.messages if message.role != "assistant"]
            prompt = content_hash(turns, chat.tools)
            for number in range(self._config.answers_per_prompt):
                if (prompt, number) not in known:
                    known.add((prompt, number))
                    yield _Dialogue(prompt, number, chat.place, list(turns), chat.tools)

    def _continue(self, dialogue: _Dialogue) -> None:
        """Asks the next user turn, or writes the chat if there is none that can be asked."""
        while dialogue.coming:
            message = dialogue.coming.pop(0)
            if message.role == "tool":
                # The result of a call that another model made.
                self._counts["dialogues that end before a tool's result"] += 1
                break
            dialogue.messages.append(message)
            if message.role == "user":
                if self._ask(dialogue):
                    return
                break
        self._write(dialogue)

    def _ask(self, dialogue: _Dialogue) -> bool:
        """Submits the chat so far, unless it is too long or the template refuses it."""
        with self._problems.record(dialogue.place):
            dialogue.asked = self._template.prompt_ids(dialogue.messages, dialogue.tools)
            if len(dialogue.asked) <= self._longest_prompt:
                self._asked[dialogue.key] = dialogue
                self._answerer.submit(dialogue.key, dialogue.asked)
                return True
            self._counts[f"prompts over {self._longest_prompt} tokens"] += 1
        return False

    def _add_answer(self, dialogue: _Dialogue, answer: Answer) -> None:
        if answer.refusal is not None:
            with self._problems.record(dialogue.place):
                raise RecordProblem(answer.refusal, kind="refused by an endpoint")
            self._write(dialogue)
            return
        text = str(self._template.tokenizer.decode(answer.token_ids, skip_special_tokens=True))
        if answer.truncated:
            # The limit may cut through a character of several tokens.
            text = text.rstrip("\ufffd")
        if not text.strip():
            self._counts["empty answers"] += 1
            self._write(dialogue)
            return
        self._counts["answers"] += 1
        self._counts["answers cut"] += answer.truncated
        dialogue.messages.append(Message("assistant", text))
        dialogue.answers.append(KeptAnswer(dialogue.asked, answer.said_ids, answer.truncated))
        whole = str(self._template.tokenizer.decode(answer.token_ids, skip_special_tokens=False))
        if dialogue.coming and not answer.truncated and whole != text:
            self._counts["dialogues that end after an answer with special tokens"] += 1
        if answer.truncated or whole != text:
            # The next turn would follow an unfinished sentence, or a text that does not say what was said.
            self._write(dialogue)
        else:
            self._continue(dialogue)

    def _write(self, dialogue: _Dialogue) -> None:
        """Writes the chat up to its last answer, if it has one."""
        generated, longest = self._answerer.num_generated, self._config.max_new_tokens
        under_way = answers_under_way(generated, self._finished, self._finished_tokens, longest)
        self._progress.advance(self._rate, under_way=under_way)
        messages = dialogue.messages
        while messages and messages[-1].role != "assistant":
            messages.pop()
        if messages:
            chat = RegeneratedChat(
                dialogue.prompt, dialogue.number, messages, dialogue.tools, dialogue.answers
            )
            self._output.write(chat, **self._origin)
            self._counts["chats written"] += 1

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._answerer.num_generated / seconds:.0f} answer tokens/s"


def limits(config: Config, context: int | None) -> tuple[int, int]:
    """Tokens of the longest prompt that is asked and of the longest answer: together they fit the context.

    An answer gets at most half of a small context.
    """
    asked = config.regenerate
    if context is None or asked.max_prompt_tokens + asked.max_new_tokens <= context:
        return asked.max_prompt_tokens, asked.max_new_tokens
    longest_answer = min(asked.max_new_tokens, max(context // 2, context - asked.max_prompt_tokens))
    return min(asked.max_prompt_tokens, context - longest_answer), longest_answer
