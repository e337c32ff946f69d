"""How a trainer finds out whether its GPU is connected to a target's, and what follows if it is not."""

import logging
from typing import Any

import pytest
import torch
from fake_membership import FakeMembership, FakeTarget
from support.tiny_target import tensors_of, tiny_batch

from eagle_rpc.rpc.envelope import Failure, Ok


def session_of(server: Any) -> Any:
    """The session that was opened last."""
    return list(server.sessions)[-1]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (None, "the probe arrived on cpu"),
        (Ok(torch.zeros(8, dtype=torch.int32)), "the probe arrived on cpu and damaged"),
        (Failure("failed", "no device map for cuda:0"), "no device map for cuda:0"),
    ],
)
def test_a_probe_that_does_not_arrive_on_a_gpu_sends_supervision_through_the_host(
    server, opened, caplog, answer, fault
):
    target = FakeTarget("target0", server)
    target.between_gpus = True
    target.refuse = lambda method: answer if method == "probe_transfer" else None
    with caplog.at_level(logging.WARNING):
        backend = opened(FakeMembership(target))
    assert session_of(server).spec.through_host
    warnings = [record.message for record in caplog.records if "host memory" in record.message]
    assert len(warnings) == 1
    assert warnings[0].startswith("supervision of target0 goes through host memory") and warnings[0].endswith(
        fault
    )
    tokens = tiny_batch(0)
    assert tensors_of(backend.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask))


def test_nothing_is_probed_where_there_is_no_way_between_gpus(server, opened):
    asked = []
    target = FakeTarget("target0", server)
    target.refuse = lambda method: asked.append(method)
    opened(FakeMembership(target))
    assert session_of(server).spec.through_host
    assert "open_session" in asked and "probe_transfer" not in asked
