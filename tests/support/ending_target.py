"""Records the functions of the package by which `job=serve` ends after SIGTERM."""

import dataclasses
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from support.elastic import HEARTBEATS
from support.processes import free_port
from support.tiny_target import tiny_target_config
from support.waiting import until
from support.workers import TEST_RPC

import eagle_rpc
from eagle_rpc.config import Config
from eagle_rpc.config.choices import MembershipKind
from eagle_rpc.config.schema import RunConfig
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.jobs import serve
from eagle_rpc.registry import RegistryClient, load_token

_PACKAGE = str(Path(eagle_rpc.__file__).parent) + "/"
_SECONDS = 60.0


def end_by_sigterm(directory: Path) -> tuple[int, list[tuple[str, str]]]:
    """The job's code, and file and function of each call, resumption and return in its main thread by then."""
    token_file = str(directory / "token")
    rpc = dataclasses.replace(
        TEST_RPC,
        membership=MembershipKind.elastic,
        registry=f"127.0.0.1:{free_port()}",
        token_file=token_file,
        host_registry=True,
        **HEARTBEATS,
    )
    files = RunConfig(name="test", dir=str(directory / "run"), cache_dir=str(directory / "cache"), threads=1)
    config = Config(run=files, rpc=rpc, target=tiny_target_config())
    signalled, acts = threading.Event(), list[tuple[str, str]]()

    def is_announced() -> bool:
        try:
            records = RegistryClient(rpc.registry, load_token(Path(token_file))).living()
        except (EagleRpcError, OSError):
            return False
        return any(record.name == "target0" and record.status for record in records)

    def send_signal() -> None:
        until(is_announced, "the target serves", seconds=_SECONDS)
        signalled.set()
        os.kill(os.getpid(), signal.SIGTERM)

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if signalled.is_set() and event in ("call", "return") and code.co_filename.startswith(_PACKAGE):
            acts.append((code.co_filename.removeprefix(_PACKAGE), code.co_name))

    threading.Thread(target=send_signal, daemon=True).start()
    sys.setprofile(note)
    try:
        return serve.run(config), acts
    finally:
        sys.setprofile(None)
