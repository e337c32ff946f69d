"""`job=regenerate`: asks the target the user turns of chats and keeps its answers."""

import contextlib
from collections.abc import Collection
from dataclasses import replace

import torch

from eagle_rpc.answers.answerer import Answerer
from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.answers.regeneration import Regeneration
from eagle_rpc.config import Config
from eagle_rpc.config.choices import AnswerBackend
from eagle_rpc.data import ChatTemplate, ChatWriter
from eagle_rpc.demo.prompts import ensure_prompts
from eagle_rpc.errors import ConfigError
from eagle_rpc.jobs.answering import service_answerer
from eagle_rpc.jobs.assembly import chat_template
from eagle_rpc.process.startup import start_worker
from eagle_rpc.target.loading import load_model, load_tokenizer
from eagle_rpc.topology import resolve_device


def run(config: Config) -> int:
    """Appends to `regenerate.output` every chat of `regenerate.prompts` that is not in it; 0 if all are.

    After a kill at any moment the next run continues from the last whole line. Raises as `Regeneration` does.
    """
    start_worker(config, "regenerate")
    ensure_prompts(config)
    # The format of the answers is that of the target that gives them.
    config = replace(config, target=replace(config.target, dtype=config.regenerate.dtype))
    tokenizer = load_tokenizer(config.target, cache_dir=config.run.cache_dir)
    if tokenizer is None:
        raise ConfigError("target.random has no tokenizer, which this job needs: name a stored target.model")
    template = chat_template(config, tokenizer)
    with _answerer(config, template) as answerer, ChatWriter(config.regenerate.output) as writer:
        Regeneration(config, answerer, template, writer).run()
    return 0


def _answerer(config: Config, template: ChatTemplate) -> contextlib.AbstractContextManager[Answerer]:
    """Raises `ConfigError` if no token ends an answer."""
    stop = template.stop_token_ids
    if not stop:
        raise ConfigError(
            "target.model must have an eos_token_id in any of its configs or tokenizer, got none"
        )
    if config.regenerate.backend is AnswerBackend.service:
        return service_answerer(config, template.tokenizer, stop)
    return contextlib.nullcontext(_engine(config, stop))


def _engine(config: Config, stop_token_ids: Collection[int]) -> AnswerEngine:
    device = torch.device(resolve_device(config.target.device))
    model, _ = load_model(config.target, device, cache_dir=config.run.cache_dir)
    return AnswerEngine(
        model,
        batch_size=config.regenerate.batch_size,
        max_new_tokens=config.regenerate.max_new_tokens,
        stop_token_ids=stop_token_ids,
        temperature=config.regenerate.temperature,
        seed=config.run.seed,
    )
