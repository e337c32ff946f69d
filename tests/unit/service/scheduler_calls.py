"""What the tests of the scheduler give it."""

import itertools
import math


class Done:
    """A pass that was over when it began."""

    is_done = True

    def __init__(self, values):
        self._values = values

    def finish(self):
        return self._values


class OneByOne:
    """Requests are functions, and none admits another."""

    overlaps = False

    def admits(self, aboard, another):
        return False

    def start(self, aboard):
        return Done([request() for request in aboard])


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
