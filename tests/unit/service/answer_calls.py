"""What the tests of answers ask a server, and an engine whose answers they know."""

import dataclasses
import threading

import torch
from server_calls import WAIT

from eagle_rpc.answers.answerer import Answer
from eagle_rpc.service.answering import SLICE_SECONDS
from eagle_rpc.supervision import AnswerPrompt, AnswerRequest, AnswerSettings

SETTINGS = AnswerSettings(max_new_tokens=8, max_length=40, stop_token_ids=(2,))


class ScriptedAnswering:
    """Says the last token of a prompt `repeats` times, one a step; a test may hold its steps."""

    def __init__(self, clock=None, *, repeats=3):
        self.clock, self.repeats = clock, repeats
        self.log = []
        self.dropped = []
        self.fault = None
        self.started, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    def check(self):
        if self.fault is not None:
            raise self.fault

    def decoder(self, settings, num_rows):
        self.log.append((settings, num_rows))
        return ScriptedDecoder(self)


class ScriptedDecoder:
    def __init__(self, owner):
        self.owner, self.left, self.ids = owner, {}, {}

    def submit(self, key, prompt, *, draws):
        assert key not in self.left
        self.left[key], self.ids[key] = self.owner.repeats, prompt[-1]
        self.owner.log.append(draws)

    def step(self):
        self.owner.started.set()
        assert self.owner.opened.wait(WAIT)
        self.owner.check()
        if self.owner.clock is not None:
            self.owner.clock.now += SLICE_SECONDS
        self.owner.log.append("step")
        self.left = {key: left - 1 for key, left in self.left.items()}
        done = [key for key, left in self.left.items() if left == 0]
        for key in done:
            del self.left[key]
        return [Answer(key, [self.ids[key]] * self.owner.repeats, truncated=True) for key in done]

    def drop(self, keys):
        self.owner.dropped += keys
        for key in keys:
            self.left.pop(key, None)


_ids = iter(range(10**9))


def prompt_request(
    server, session, ids=(5, 6, 7), *, request_id=None, seconds_left=WAIT, key="a", **settings
):
    return AnswerRequest(
        session=session,
        incarnation=server.model_info().incarnation,
        request_id=request_id or f"p{next(_ids)}",
        prompt=AnswerPrompt(
            key=key, token_ids=torch.tensor(ids), settings=dataclasses.replace(SETTINGS, **settings)
        ),
        seconds_left=seconds_left,
    )


def prompt(server, session, *args, **fields):
    """The future of an answer."""
    return server.answer(prompt_request(server, session, *args, **fields))


def said(future):
    return future.result(WAIT).token_ids.tolist()
