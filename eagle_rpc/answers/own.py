"""A model of this process as an answerer."""

import logging
from typing import Any

from transformers import PreTrainedModel

from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.answers.plain import PlainAnswerer
from eagle_rpc.answers.probe import probe_answers, probe_engine
from eagle_rpc.errors import UnsupportedTarget

logger = logging.getLogger(__name__)


def own_answerer(model: PreTrainedModel, **settings: Any) -> AnswerEngine | PlainAnswerer:
    """The batched engine, or transformers' `generate` for a model that the engine does not decode.

    Both take the same settings. Raises `UnsupportedTarget` if neither says what the model says without a
    cache.
    """
    try:
        probe_engine(model)
    except UnsupportedTarget as error:
        logger.warning("transformers' generate answers, which is slower: %s", error)
        probe_answers(model, PlainAnswerer, "transformers' generate")
        return PlainAnswerer(model, **settings)
    return AnswerEngine(model, **settings)
