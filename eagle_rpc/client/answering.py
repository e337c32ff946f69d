"""Answers to prompts from all targets of a service."""

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch

from eagle_rpc.client.dispatcher import PendingRequest
from eagle_rpc.client.remote import RemoteTargets
from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.errors import TargetUnavailable
from eagle_rpc.rpc import Membership
from eagle_rpc.supervision import AnswerPrompt, PromptAnswer, SessionSpec, TargetExpectation


class AnsweringTargets(RemoteTargets):
    """Each prompt is answered once, by whichever target: those of a lost or draining one are asked elsewhere."""

    def __init__(
        self,
        membership: Membership,
        *,
        settings: ClientSettings,
        expected: TargetExpectation,
        stop: threading.Event,
    ) -> None:
        """As `RemoteTargets`, and `UnsupportedTarget`. `settings.prefetch`: prompts at each target."""
        super().__init__(membership, settings=settings, expected=expected, stop=stop)
        self._waiting: deque[AnswerPrompt] = deque()
        self._under_way: dict[PendingRequest, AnswerPrompt] = {}
        # A session has a draft vocabulary; nothing here reads it. `logits` needs no probe of the head.
        session = replace(settings.session, answers=True, encoding="logits")
        try:
            self._fleet.open_sessions(SessionSpec.of(session, torch.tensor([0]), expected))
        except BaseException:
            # Also after Ctrl-C during the wait: the threads must end.
            self.close()
            raise

    def submit(self, prompt: AnswerPrompt) -> None:
        """Queues a prompt, also while `answers` runs."""
        self._waiting.append(prompt)

    def answers(self) -> Iterator[tuple[AnswerPrompt, PromptAnswer]]:
        """Yields answers in the order in which they come, until no prompt is left.

        Raises a target's refusal of a prompt, and `TargetUnavailable` after the reconnect deadline or once
        told to stop.
        """
        while self._waiting or self._under_way:
            if self._stop.is_set():
                left = len(self._waiting) + len(self._under_way)
                raise TargetUnavailable(f"told to stop while {left} prompts had no answer yet")
            room = self._settings.prefetch * max(1, len(self._fleet.replicas()))
            while self._waiting and len(self._under_way) < room:
                prompt = self._waiting.popleft()
                self._under_way[self._dispatcher.submit(prompt)] = prompt
            for request in self._dispatcher.wait_any(self._under_way):
                answer = request.result()
                assert isinstance(answer, PromptAnswer)
                yield self._under_way.pop(request), answer
