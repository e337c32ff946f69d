"""What the tests of the scheduler give it."""

import itertools
import math
from concurrent.futures import Future

from eagle_rpc.service.answering import AnswerDesk, NoAnswering
from eagle_rpc.service.fairness import Work


class Done:
    """A pass that was over when it began."""

    is_done = True

    def __init__(self, value):
        self._value = value

    def finish(self):
        return self._value


def no_answers(clock):
    """The desk of a target that answers no prompts."""
    return AnswerDesk(NoAnswering(), max_answers=1, max_tokens=1, clock=clock)


class OneByOne:
    """Requests are functions."""

    overlaps = False

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
    num_runs=1,
    record=lambda outcome: None,
):
    """The future of the answer."""
    work = Work(request, run, session, request_id or f"r{next(_ids)}", deadline, record, Future())
    scheduler.submit(work, num_runs=num_runs)
    return work.answer


def submit_prompt(scheduler, prompt, *, run="job", session="a"):
    """The future of the answer to a prompt."""
    request_id = f"p{next(_ids)}"
    work = Work(prompt, run, session, request_id, math.inf, lambda outcome: None, Future())
    scheduler.submit_prompt(work, num_runs=1)
    return work.answer


_ids = itertools.count()
