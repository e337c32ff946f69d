"""What the tests of the scheduler give it."""

import itertools
import math


class Done:
    """A pass that was over when it began."""

    is_done = True

    def __init__(self, value):
        self._value = value

    def finish(self):
        return self._value


class OneByOne:
    """Requests are functions."""

    overlaps = False

    def start(self, request):
        return Done(request())


def submit(
    scheduler,
    request,
    *,
    job="job",
    session="a",
    request_id=None,
    deadline=math.inf,
    num_jobs=1,
    settle=lambda reply: None,
):
    return scheduler.submit(
        request,
        job=job,
        session=session,
        request_id=request_id or f"r{next(_ids)}",
        deadline=deadline,
        num_jobs=num_jobs,
        settle=settle,
    )


_ids = itertools.count()
