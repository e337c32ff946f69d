"""Errors that cross the wire in an envelope."""

import pytest

from eagle_rpc import errors
from eagle_rpc.rpc.envelope import Failure, failure_of, reply_of, unwrap


@pytest.mark.parametrize(
    "raised",
    [
        errors.InvalidRequest,
        errors.TargetMismatch,
        errors.UnsupportedTarget,
        errors.UnknownSession,
        errors.StaleIncarnation,
        errors.TargetBusy,
        errors.TargetDraining,
        errors.RequestExpired,
        errors.TargetOutOfMemory,
        errors.TargetFailed,
    ],
)
def test_an_error_crosses_the_wire_as_the_same_class(raised):
    with pytest.raises(raised, match="target0: why") as caught:
        unwrap(failure_of(raised("why")), sender="target0")
    assert type(caught.value) is raised


def test_a_busy_target_says_when_to_come_back():
    busy = errors.TargetBusy("full")
    busy.retry_after = 0.7
    with pytest.raises(errors.TargetBusy) as caught:
        unwrap(failure_of(busy), sender="target0")
    assert caught.value.retry_after == 0.7


def test_an_error_without_a_code_travels_as_failed():
    assert failure_of(errors.CheckpointError("why")) == Failure("failed", "CheckpointError: why")


def test_a_code_of_a_newer_target_is_a_failed_request():
    with pytest.raises(errors.TargetFailed, match="target0: why"):
        unwrap(Failure("of the future", "why"), sender="target0")


def test_values_and_unforeseen_exceptions_become_replies(caplog):
    assert unwrap(reply_of(lambda: 3), sender="target0") == 3
    assert reply_of(lambda: {}["x"]) == Failure("failed", "KeyError: 'x'")
    assert caplog.records[-1].exc_info
