"""`job=regenerate`: asks the target the user turns of chats and keeps its answers."""

import contextlib
import datetime
import logging
from dataclasses import replace

import torch

from eagle_rpc.answers.answerer import Answerer
from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.answers.openai import endpoint_answerer
from eagle_rpc.answers.output import open_answers
from eagle_rpc.answers.plain import PlainAnswerer
from eagle_rpc.answers.probe import probe_engine
from eagle_rpc.answers.regeneration import Regeneration, limits
from eagle_rpc.config import Config
from eagle_rpc.config.choices import AnswerBackend
from eagle_rpc.data import ChatTemplate
from eagle_rpc.demo.prompts import ensure_prompts
from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.jobs.answering import service_answerer
from eagle_rpc.jobs.assembly import chat_template
from eagle_rpc.process.startup import start_worker
from eagle_rpc.target.loading import load_model, load_target_config, load_tokenizer
from eagle_rpc.topology import resolve_device

logger = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Appends to `regenerate.output` every chat of `regenerate.prompts` that is not in it; 0 if all are.

    After a kill at any moment the next run continues from the last whole line. Raises as `open_answers` and
    `Regeneration` do.
    """
    start_worker(config, "regenerate")
    ensure_prompts(config)
    # The format of the answers is that of the target that gives them.
    config = replace(config, target=replace(config.target, dtype=config.regenerate.dtype))
    tokenizer = load_tokenizer(config.target, cache_dir=config.run.cache_dir)
    if tokenizer is None:
        raise ConfigError("target.random has no tokenizer, which this job needs: name a stored target.model")
    with open_answers(config.regenerate.output, prompts=config.regenerate.prompts) as output:
        date = config.data.date or output.date or datetime.date.today().isoformat()
        template = chat_template(config, tokenizer, date=date)
        with _answerer(config, template) as answerer:
            Regeneration(config, answerer, template, output, date=date).run()
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
    if config.regenerate.backend is AnswerBackend.openai:
        stored = load_target_config(config.target, cache_dir=config.run.cache_dir).get_text_config()
        return endpoint_answerer(config, template, context=getattr(stored, "max_position_embeddings", None))
    return contextlib.nullcontext(_own_answerer(config, template))


def _own_answerer(config: Config, template: ChatTemplate) -> Answerer:
    """The batched engine, or transformers' `generate` for a model that the engine does not decode."""
    device = torch.device(resolve_device(config.target.device))
    model, _ = load_model(config.target, device, cache_dir=config.run.cache_dir)
    kind: type[AnswerEngine] | type[PlainAnswerer] = AnswerEngine
    try:
        probe_engine(model)
    except UnsupportedTarget as error:
        logger.warning("transformers' generate answers, which is slower: %s", error)
        kind = PlainAnswerer
    asked = config.regenerate
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return kind(
        model,
        batch_size=asked.batch_size,
        max_new_tokens=limits(config, context)[1],
        stop_token_ids=template.stop_token_ids,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        seed=config.run.seed,
        stop_texts=asked.stop,
        tokenizer=template.tokenizer,
    )
