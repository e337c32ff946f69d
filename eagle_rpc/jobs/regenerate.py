"""Asks the target the user turns of chats and keeps its answers: what a draft has to learn is how this target speaks.

A line of the output is a chat, `prompt` (a hash of what was asked), `settings` (what produced the answers) and `truncated`:
whether the last answer stops for want of tokens, so that no end of turn may be read into it.
"""

import hashlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from eagle_rpc.answers.engine import Answer, AnswerEngine
from eagle_rpc.config import Config
from eagle_rpc.data import ChatTemplate, ChatWriter, Message, content_hash, read_chats
from eagle_rpc.data.problems import RecordProblems
from eagle_rpc.demo.prompts import ensure_prompts
from eagle_rpc.errors import ConfigError
from eagle_rpc.process.startup import start_worker
from eagle_rpc.supervision.fingerprint import weights_fingerprint
from eagle_rpc.target.loading import load_model
from eagle_rpc.topology import resolve_device

logger = logging.getLogger(__name__)

_LINE_SECONDS = 10.0


def run(config: Config) -> int:
    """Appends to `regenerate.output` every chat of `regenerate.prompts` that is not in it; 0 when all are.

    Killed at any moment, the next run goes on from the last whole line. Raises `ConfigError` if the output was made with
    other settings, `DataError` for bad prompts.
    """
    start_worker(config, "regenerate")
    settings = config.regenerate
    ensure_prompts(config)
    target = replace(config.target, dtype=settings.dtype)
    if target.random:
        raise ConfigError(f"regenerate must ask a target with a tokenizer, got target.random {target.random}")
    model, tokenizer = load_model(
        target, torch.device(resolve_device(target.device)), cache_dir=config.run.cache_dir
    )
    with ChatWriter(settings.output) as writer:
        regeneration = Regeneration(config, model, ChatTemplate(tokenizer, config.data.chat_template), writer)
        regeneration.run()
    return 0


@dataclass(slots=True)
class _Dialogue:
    """A chat in the making."""

    prompt: str  # hash of all that system and user say
    line: int
    unsaid: list[Message]  # what system and user are still going to say
    said: list[Message] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Names the next answer; sampling depends on it."""
        return f"{self.prompt}/{len(self.said)}"


class Regeneration:
    """One run of the job. `writer` stands at the end of `regenerate.output`."""

    def __init__(
        self, config: Config, model: PreTrainedModel, template: ChatTemplate, writer: ChatWriter
    ) -> None:
        self._config = config.regenerate
        self._on_error = config.data.on_error
        self._template = template
        self._writer = writer
        self._produced_by = _produced_by(config, model)
        self._longest_prompt = _longest_prompt(config, model)
        self._problems = RecordProblems(Path(self._config.prompts), config.data.on_error)
        self._engine = AnswerEngine(
            model,
            slots=self._config.batch_size,
            max_new_tokens=self._config.max_new_tokens,
            eos_token_ids=_eos_token_ids(model, template),
            temperature=self._config.temperature,
            seed=config.run.seed,
        )
        self._asked: dict[str, _Dialogue] = {}
        self._counts: Counter[str] = Counter()

    def run(self) -> None:
        """Asks, listens and writes until every dialogue is complete."""
        done = finished_prompts(self._config.output, self._produced_by)
        dialogues = list(self._dialogues(done))
        logger.info("%d chats to ask, %d already in %s", len(dialogues), len(done), self._config.output)
        self._progress = _Progress(len(dialogues), self._engine)
        for dialogue in dialogues:
            self._go_on(dialogue)
        for answer in self._engine.answers():
            self._progress.add_answer(answer)
            self._hear(self._asked.pop(answer.key), answer)
        self._progress.close()
        counts = ", ".join(
            f"{what} {count}" for what, count in (self._counts + self._problems.skipped).items()
        )
        logger.info("%s: %s", self._config.output, counts or "nothing new")

    def _dialogues(self, done: set[str]) -> Iterator[_Dialogue]:
        chats = read_chats(self._config.prompts, on_error=self._on_error, needed_role="user").chats
        known = set(done)
        for chat in chats[: self._config.num_prompts]:
            heard = [message for message in chat.messages if message.role != "assistant"]
            prompt = content_hash(heard)
            if prompt not in known:
                known.add(prompt)
                yield _Dialogue(prompt, chat.line, heard)

    def _go_on(self, dialogue: _Dialogue) -> None:
        """Asks the next question, or writes the chat if there is none that can be asked."""
        while dialogue.unsaid:
            message = dialogue.unsaid.pop(0)
            dialogue.said.append(message)
            if message.role == "user":
                if not self._ask(dialogue):
                    break
                return
        self._write(dialogue)

    def _ask(self, dialogue: _Dialogue) -> bool:
        """Submits what has been said, unless it is too long or the template refuses it."""
        with self._problems.record(dialogue.line):
            token_ids = self._template.prompt_ids(dialogue.said)
            if len(token_ids) <= self._longest_prompt:
                self._asked[dialogue.key] = dialogue
                self._engine.submit(dialogue.key, token_ids)
                return True
            self._counts[f"prompts over {self._longest_prompt} tokens"] += 1
        return False

    def _hear(self, dialogue: _Dialogue, answer: Answer) -> None:
        text = self._template.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        if answer.truncated:
            # The cut may go through a character of several tokens.
            text = text.rstrip("\ufffd")
        if not text.strip():
            self._counts["empty answers"] += 1
            self._write(dialogue)
            return
        dialogue.said.append(Message("assistant", text))
        if answer.truncated:
            # What the user says next would follow a sentence that breaks off, so the chat ends here.
            self._write(dialogue, truncated=True)
        else:
            self._go_on(dialogue)

    def _write(self, dialogue: _Dialogue, *, truncated: bool = False) -> None:
        """Writes the chat up to its last answer, if it has one."""
        self._progress.add_chat()
        while dialogue.said and dialogue.said[-1].role != "assistant":
            dialogue.said.pop()
        if dialogue.said:
            self._writer.write(
                dialogue.said, prompt=dialogue.prompt, settings=self._produced_by, truncated=truncated
            )
            self._counts["chats written"] += 1
            self._counts["chats truncated"] += truncated


def finished_prompts(output: str | Path, produced_by: dict[str, Any]) -> set[str]:
    """Hashes of what the chats of an output file were asked.

    Raises `ConfigError` if a line is not this job's, or if its answers were made with other settings.
    """
    prompts = set()
    with Path(output).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                prompt, settings = record["prompt"], record["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"regenerate.output must be absent or written by this job, got {output} with a foreign line {number}"
                ) from error
            different = [
                f"{name} {settings.get(name)}, now {value}"
                for name, value in produced_by.items()
                if settings.get(name) != value
            ]
            if different:
                raise ConfigError(
                    f"regenerate.output must be of one make, got {output} with {'; '.join(different)}: "
                    "name another file or remove this one"
                )
            prompts.add(prompt)
    return prompts


def _produced_by(config: Config, model: PreTrainedModel) -> dict[str, Any]:
    """All that an answer depends on besides its prompt."""
    template = config.data.chat_template
    return {
        "target": weights_fingerprint(model),
        "chat_template": template and hashlib.sha256(Path(template).read_bytes()).hexdigest()[:16],
        "max_new_tokens": config.regenerate.max_new_tokens,
        "temperature": config.regenerate.temperature,
        "seed": config.run.seed if config.regenerate.temperature > 0 else None,
    }


def _longest_prompt(config: Config, model: PreTrainedModel) -> int:
    """Tokens of the longest prompt that may be asked, with room for its answer in the target's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = (
        config.regenerate.max_prompt_tokens if context is None else context - config.regenerate.max_new_tokens
    )
    if room < 1:
        raise ConfigError(
            f"regenerate.max_new_tokens must be less than the target's context {context}, got {config.regenerate.max_new_tokens}"
        )
    return min(config.regenerate.max_prompt_tokens, room)


def _eos_token_ids(model: PreTrainedModel, template: ChatTemplate) -> set[int]:
    """Every token that the model, its generation defaults or its tokenizer end an answer with. Raises `ConfigError` if none."""
    ids: set[int] = set()
    for owner in (model.config, model.generation_config, template.tokenizer):
        named = owner.eos_token_id
        ids.update([named] if isinstance(named, int) else named or [])
    if not ids:
        raise ConfigError(
            "target.model must name an eos_token_id in its config, generation config or tokenizer, got none"
        )
    return ids


class _Progress:
    """A bar on a terminal, a log line every few seconds elsewhere."""

    def __init__(self, total: int, engine: AnswerEngine) -> None:
        self._total = total
        self._engine = engine
        self._chats = 0
        self._finished_tokens = 0
        self._started = self._shown = time.monotonic()
        self._bar = (
            tqdm(total=total, unit="chat", dynamic_ncols=True, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )

    def add_answer(self, answer: Answer) -> None:
        self._finished_tokens += len(answer.token_ids) + (not answer.truncated)

    def add_chat(self) -> None:
        """One more chat is written or given up."""
        self._chats += 1
        now = time.monotonic()
        rate = self._engine.num_generated / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:.0f} answer tokens/s", refresh=False)
            self._bar.update()
        elif now - self._shown >= _LINE_SECONDS or self._chats == self._total:
            self._shown = now
            # Chats end in waves, so what is half said counts too.
            tokens_left = self._total * self._finished_tokens / self._chats - self._engine.num_generated
            seconds = max(0.0, tokens_left) / max(rate, 1e-9)
            logger.info(
                "%d/%d chats, %.0f answer tokens/s, %.0f s left", self._chats, self._total, rate, seconds
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
