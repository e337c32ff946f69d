"""What the tests of the scheduler give it."""

import itertools
import math
from concurrent.futures import Future

from server_calls import config

from eagle_rpc.service.answering import AnswerDesk
from eagle_rpc.service.fairness import Demand, Work
from eagle_rpc.service.scheduler import ForwardScheduler


class Done:
    """A pass that was over when it began."""

    is_done = True

    def __init__(self, value):
        self._value = value

    def wait(self):
        pass

    def finish(self):
        return self._value


def scheduler_of(passes, clock, answering=None, **bounds):
    """A scheduler with settings of a target."""
    demand, settings = Demand(clock), config(**bounds)
    return ForwardScheduler(passes, AnswerDesk(answering, settings, demand, clock), settings, demand, clock)


class OneByOne:
    """Requests are functions."""

    most_before = 0

    def start(self, request):
        return Done(request())


def submit(
    scheduler,
    request,
    *,
    run="job",
    session="a",
    request_id=None,
    deadline=math.inf,
    record=lambda outcome: None,
):
    """The future of the answer."""
    work = Work(request, run, session, request_id or f"r{next(_ids)}", deadline, record, Future())
    scheduler.submit(work)
    return work.answer


def submit_prompt(scheduler, prompt, *, run="job", session="a"):
    """The future of the answer to a prompt."""
    request_id = f"p{next(_ids)}"
    work = Work(prompt, run, session, request_id, math.inf, lambda outcome: None, Future())
    scheduler.submit_prompt(work)
    return work.answer


_ids = itertools.count()
