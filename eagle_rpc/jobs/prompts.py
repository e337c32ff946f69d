"""The two files of prompts, made by `data.prompt_source` where they are absent."""

import datetime
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eagle_rpc.answers.prompt_filters import normalised
from eagle_rpc.answers.self_prompts import SelfPrompts, open_log
from eagle_rpc.config import Config
from eagle_rpc.config.choices import AnswerBackend, OnError, PromptSource
from eagle_rpc.data import read_chats
from eagle_rpc.demo.prompts import NUM_HELDOUT, NUM_TRAIN, prepare_chitchat_prompts
from eagle_rpc.errors import ConfigError
from eagle_rpc.jobs.assembly import chat_template
from eagle_rpc.jobs.backends import answerer
from eagle_rpc.process.files import replaced_file
from eagle_rpc.target.model_files import load_tokenizer

logger = logging.getLogger(__name__)


def ensure_prompts(config: Config, needed: str) -> None:
    """Writes prompts for training and evaluation, without overlap, if `data.prompt_source` names a source.

    Nothing is written, and no package or model is needed, if the file `needed`, one of the two, exists.
    """
    if Path(needed).exists():
        return
    if config.data.prompt_source is PromptSource.chitchat:
        directory = Path(config.run.cache_dir) / "chitchat"
        prepare_chitchat_prompts(directory, num_train=NUM_TRAIN, num_heldout=NUM_HELDOUT)
    elif config.data.prompt_source is PromptSource.self:
        _ensure_self_prompts(config, Path(config.regenerate.prompts), Path(config.evaluate.prompts))


def _ensure_self_prompts(config: Config, train: Path, heldout: Path) -> None:
    """Writes the absent ones of two files of JSON lines. A name of another kind is a source of its own."""
    absent = [path for path in (heldout, train) if path.suffix == ".jsonl" and not path.exists()]
    if not absent:
        return
    prompts = _self_prompts(config, train.with_name(f"{train.stem}.attempts.jsonl"))
    num_heldout = config.prompts.num_heldout
    if heldout in absent:
        _write(heldout, prompts[:num_heldout])
    if train in absent:
        _write(train, _apart(prompts[num_heldout:], heldout))


def _self_prompts(config: Config, log_path: Path) -> list[str]:
    """Held-out prompts, then those to train on."""
    wanted = config.prompts
    config = replace(config, target=replace(config.target, dtype=config.regenerate.dtype))
    tokenizer = load_tokenizer(config.target, cache_dir=config.run.cache_dir)
    if tokenizer is None:
        raise ConfigError("target.random has no tokenizer to write prompts with: name a stored target.model")
    with open_log(log_path) as log:
        date = config.data.date or log.date or datetime.date.today().isoformat()
        template = chat_template(config, tokenizer, date=date)
        turn = template.user_turn(wanted.system)
        if turn.end_text and config.regenerate.backend is AnswerBackend.service:
            raise ConfigError(
                "data.prompt_source=self must not go with regenerate.backend=service for this chat template, "
                f"which ends a user's turn by the text {turn.end_text!r}: a service ends answers by tokens alone"
            )
        asked = replace(
            config.regenerate,
            max_prompt_tokens=len(turn.prompt_ids),
            max_new_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            top_k=0,
            stop=[turn.end_text] if turn.end_text else [],
        )
        ends = [] if turn.end_id is None else [turn.end_id]
        with answerer(replace(config, regenerate=asked), template, also_stop=ends) as writer:
            ahead = 2 * max(asked.batch_size, asked.concurrency * len(asked.endpoints))
            return SelfPrompts(
                wanted, writer, template, log, seed=config.run.seed, date=date, ahead=ahead
            ).make()


def _apart(prompts: Sequence[str], heldout: Path) -> list[str]:
    """The prompts that are not in the file of held-out ones, which may be the user's own."""
    if not heldout.exists():
        return list(prompts)
    chats = read_chats(str(heldout), on_error=OnError.skip, needed_role="user").chats
    known = {normalised(message.content) for chat in chats for message in chat.messages}
    apart = [prompt for prompt in prompts if normalised(prompt) not in known]
    if len(apart) < len(prompts):
        logger.info("%d prompts left out, which %s holds", len(prompts) - len(apart), heldout)
    return apart


def _write(path: Path, prompts: Sequence[str]) -> None:
    with replaced_file(path) as fresh, fresh.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            record = {"messages": [{"role": "user", "content": prompt}]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    logger.info("wrote %d prompts to %s", len(prompts), path)
