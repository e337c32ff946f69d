"""The targets of a running service as an `Answerer`: they run the engine, this process needs no model."""

from collections.abc import Iterator, Sequence

import torch

from eagle_rpc.answers.answerer import Answer
from eagle_rpc.client.answering import AnsweringTargets
from eagle_rpc.supervision import AnswerPrompt, AnswerSettings


class ServiceAnswerer:
    """All targets that serve now or later. Greedy answers have the ids of the own engine in the same format."""

    def __init__(self, targets: AnsweringTargets, settings: AnswerSettings) -> None:
        self.num_generated = 0
        self._targets, self._settings = targets, settings

    @property
    def fingerprint(self) -> str:
        return self._targets.model_info().weights_fingerprint

    @property
    def context(self) -> int:
        return self._targets.model_info().max_length

    def submit(self, key: str, prompt: Sequence[int]) -> None:
        self._targets.submit(AnswerPrompt(key=key, token_ids=torch.tensor(prompt), settings=self._settings))

    def answers(self) -> Iterator[Answer]:
        """Raises a target's refusal of a prompt, and `TargetUnavailable` after the reconnect deadline."""
        for prompt, answer in self._targets.answers():
            said_ids = answer.token_ids.tolist()
            self.num_generated += len(said_ids)
            yield Answer.of_said(prompt.key, said_ids, truncated=answer.truncated)
