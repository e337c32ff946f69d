"""What answers prompts, by `regenerate.backend`."""

import contextlib
from collections.abc import Collection

import torch

from eagle_rpc.answers.answerer import Answerer
from eagle_rpc.answers.openai import endpoint_answerer
from eagle_rpc.answers.own import own_answerer
from eagle_rpc.answers.regeneration import limits
from eagle_rpc.config import Config
from eagle_rpc.config.choices import AnswerBackend
from eagle_rpc.data import ChatTemplate
from eagle_rpc.errors import ConfigError
from eagle_rpc.jobs.answering import service_answerer
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.loading import load_model
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.topology import resolve_device


def answerer(
    config: Config, template: ChatTemplate, *, also_stop: Collection[int] = ()
) -> contextlib.AbstractContextManager[Answerer]:
    """Answers with the settings of `regenerate`, which end at the template's stop tokens and at `also_stop`.

    Raises `ConfigError` if no token ends an answer.
    """
    stop = template.stop_token_ids.union(also_stop)
    if not stop:
        raise ConfigError(
            "target.model must have an eos_token_id in any of its configs or tokenizer, got none"
        )
    if config.regenerate.backend is AnswerBackend.service:
        return service_answerer(config, template.tokenizer, stop)
    if config.regenerate.backend is AnswerBackend.openai:
        shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
        return endpoint_answerer(config, template, context=shape.context, also_stop=also_stop)
    return contextlib.nullcontext(_own_answerer(config, template, stop))


def _own_answerer(config: Config, template: ChatTemplate, stop_token_ids: Collection[int]) -> Answerer:
    device = torch.device(resolve_device(config.target.device))
    model, _ = load_model(config.target, device, cache_dir=config.run.cache_dir)
    asked = config.regenerate
    return own_answerer(
        model,
        batch_size=asked.batch_size,
        max_new_tokens=limits(config, TargetShape.of(model.config).context)[1],
        stop_token_ids=stop_token_ids,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        seed=config.run.seed,
        stop_texts=asked.stop,
        tokenizer=template.tokenizer,
    )
