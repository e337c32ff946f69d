"""Entries of the registry."""

from typing import Any

from eagle_rpc.registry import Record


def target_record(status: dict[str, Any]) -> Record:
    return Record(
        name="target0",
        role="target",
        run="",
        id=1,
        incarnation="ab" * 8,
        url="uv://127.0.0.1:1",
        device="cpu",
        gpu="",
        host="here",
        pid=4711,
        status=status,
    )
