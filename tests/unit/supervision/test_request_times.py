"""Times of requests: what a trainer waited for, and what it takes from a peer."""

import math

import pytest

from eagle_rpc.errors import PayloadRefused
from eagle_rpc.supervision import RequestTotals, ServiceTimes, Waits, times_of, waits_of

SERVICE = ServiceTimes(queue=2.0, forward=4.0, encode=1.0)
TIMES = times_of(SERVICE, client=3.0, round_trip=10.0, decode=0.5)


def test_the_wire_is_what_the_round_trip_has_beside_the_target():
    assert TIMES._asdict() == {
        **{"client": 3.0, "queue": 2.0, "forward": 4.0, "encode": 1.0},
        **{"wire": 3.0, "decode": 0.5},
    }
    # Two clocks may differ by a little.
    assert times_of(SERVICE, client=0.0, round_trip=6.9, decode=0.0).wire == 0.0


@pytest.mark.parametrize(
    ("seconds", "waits"),
    [
        (0.0, Waits(0.0, 0.0, 0.0)),
        (2.0, Waits(0.0, 0.0, 2.0)),
        (7.0, Waits(0.0, 4.0, 3.0)),
        (13.0, Waits(5.0, 5.0, 3.0)),
    ],
)
def test_the_last_seconds_before_a_reply_count_as_what_went_on_then(seconds, waits):
    assert waits_of(seconds, TIMES) == waits
    assert sum(waits) == seconds


def test_totals_of_an_interval_are_the_difference_of_its_ends():
    one = RequestTotals(1, TIMES, waits_of(7.0, TIMES))
    both = one.plus(one)
    assert both.requests == 2 and both.seconds_waited == 14.0 and both.times.wire == 6.0
    assert both.minus(one) == one


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, 1, "1", None])
def test_times_of_a_peer_that_are_no_seconds_are_refused(value):
    SERVICE.check()
    with pytest.raises(PayloadRefused, match="encode of a reply's times must be seconds"):
        ServiceTimes(queue=0.0, forward=0.0, encode=value).check()
