"""Answers over RPC: the batched engine of a target that serves, and the service as seen by who asks it."""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.answers.probe import probe_engine
from eagle_rpc.answers.regeneration import limits
from eagle_rpc.answers.service import ServiceAnswerer
from eagle_rpc.client.answering import AnsweringTargets
from eagle_rpc.config import Config
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.jobs.assembly import client_settings, expectation
from eagle_rpc.jobs.elastic_worker import announced
from eagle_rpc.process import stop_signals
from eagle_rpc.supervision import AnswerSettings
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.topology import Role, Worker


class EngineAnswering:
    """Decodes prompts by the model of a target, in the form in which the target runs it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._checked = False

    def check(self) -> None:
        """Raises `UnsupportedTarget` for a model on several devices, or one that the engine cannot decode."""
        if self._checked:
            return
        devices = {weight.device for weight in self._model.parameters()}
        if len(devices) > 1:
            raise UnsupportedTarget(f"to answer prompts, a target must be on one device, got {len(devices)}")
        probe_engine(self._model)
        self._checked = True

    def decoder(self, settings: AnswerSettings, num_rows: int) -> AnswerEngine:
        self.check()
        return AnswerEngine(
            self._model,
            batch_size=num_rows,
            max_new_tokens=settings.max_new_tokens,
            stop_token_ids=settings.stop_token_ids,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=settings.seed,
        )


@contextlib.contextmanager
def service_answerer(
    config: Config, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Collection[int]
) -> Iterator[ServiceAnswerer]:
    """All targets of the registry, while the body runs.

    Raises `TargetMismatch`, `UnsupportedTarget`, `TargetUnavailable`.
    """
    asked, me = config.regenerate, Worker("regenerate", frozenset([Role.trainer]), 0)
    shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
    settings = replace(
        client_settings(config, me),
        prefetch=asked.concurrency,
        request_timeout=asked.answer_timeout,
        most_targets=None,
    )
    # Any layers may be captured: answers do not depend on them.
    expected = replace(expectation(config, shape, tokenizer), aux_layer_ids=None)
    with (
        stop_signals() as stop,
        announced(
            config, me.name, Role.trainer, torch.device("cpu"), stop, when_superseded=stop.set
        ) as membership,
        contextlib.closing(
            AnsweringTargets(membership, settings=settings, expected=expected, stop=stop)
        ) as targets,
    ):
        membership.report(targets.status)
        longest_prompt, longest_answer = limits(config, targets.model_info().max_length)
        yield ServiceAnswerer(
            targets,
            AnswerSettings(
                max_new_tokens=longest_answer,
                max_length=longest_prompt + longest_answer,
                stop_token_ids=tuple(sorted(stop_token_ids)),
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=asked.top_k,
                seed=config.run.seed if asked.temperature > 0 else 0,
            ),
        )
