"""An attacker with torch's own RPC agent: without the fence, it sends any bytes to a fenced server."""

import contextlib
import io
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from support.tiny_target import tiny_target_config
from support.workers import forking
from torch.distributed import rpc
from torch.distributed.rendezvous import register_rendezvous_handler

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.process import bind_to_interface
from eagle_rpc.rpc import host, internals
from eagle_rpc.rpc.agent import running_agent
from eagle_rpc.rpc.fence import Permissions
from eagle_rpc.topology import Role

SERVER, ATTACKER = "target0", "attacker"
# In torch, a process keeps one id.
SERVER_ID, ATTACKER_ID = 1, 2
_TIMEOUT = 30.0


def lone_agent(
    name: str, worker_id: int, config: RpcConfig, permissions: Permissions
) -> contextlib.AbstractContextManager[None]:
    """This package's agent, alone in its group, without device maps."""
    settings: dict[str, Any] = {"world_size": None, "store": dist.HashStore(), "device_maps": {}}
    return running_agent(name, worker_id=worker_id, config=config, permissions=permissions, **settings)


def fenced_server(pipe: Any, config: RpcConfig, permissions: Permissions) -> None:
    """Runs in a process of its own: an agent that hosts a tiny target, until `pipe` says that it must end."""
    from eagle_rpc.service.endpoint import CONTROL_METHODS, TargetEndpoint
    from eagle_rpc.service.server import TargetModelServer
    from eagle_rpc.target.model import HFEagle3TargetModel

    torch.set_num_threads(1)
    target = HFEagle3TargetModel.load(tiny_target_config(), "cpu", cache_dir="unused", seed=0)
    server = TargetModelServer(target, tiny_target_config(max_sessions=4096))
    with lone_agent(SERVER, SERVER_ID, config, permissions):
        host(TargetEndpoint(server), CONTROL_METHODS)
        pipe.send(internals.bound_url(SERVER))
        internals.add_peer(ATTACKER, ATTACKER_ID, pipe.recv(), {})
        pipe.send("ready")
        pipe.recv()
        server.close()


@contextlib.contextmanager
def attacked_server(config: RpcConfig) -> Iterator[Any]:
    """This process becomes the attacker; yields the server's `Process`, which must outlive the body."""
    pipe, theirs = forking.Pipe()
    process = forking.Process(
        target=fenced_server, args=(theirs, config, permissions(config, Role.target)), daemon=True
    )
    process.start()
    try:
        with stock_agent():
            assert pipe.poll(60), "the server did not start within 60 s"
            internals.remove_peer(SERVER, SERVER_ID)
            internals.add_peer(SERVER, SERVER_ID, pipe.recv(), {})
            pipe.send(internals.bound_url(ATTACKER))
            assert pipe.poll(60), "the server did not answer within 60 s"
            pipe.recv()
            yield process
            pipe.send("end")
            process.join(30)
            assert process.exitcode == 0
    finally:
        if process.is_alive():
            process.kill()
            process.join()


@contextlib.contextmanager
def stock_agent() -> Iterator[None]:
    """torch's agent as torch starts it: without a fence, alone in its group."""
    bind_to_interface("lo")
    rpc.init_rpc(
        ATTACKER,
        rank=ATTACKER_ID,
        rpc_backend_options=internals.agent_options("eagle-attacker://", RpcConfig(), cuda=False),
    )
    # torch asks the first agent of a process for the owner of an RRef: each agent must know the server.
    internals.add_peer(SERVER, SERVER_ID, internals.bound_url(ATTACKER), {})
    try:
        yield
    finally:
        rpc.shutdown(graceful=False)


def _alone(_url: str, **_settings: object) -> Iterator[tuple[dist.Store, int, int]]:
    yield dist.HashStore(), 0, -1


register_rendezvous_handler("eagle-attacker", _alone)


class Answers:
    """Sends many requests with a bounded number under way, and collects values and failures."""

    def __init__(self, window: int = 64) -> None:
        self.sent = 0
        self.values: list[Any] = []
        self.failures: list[str] = []
        self._credits = threading.Semaphore(window)
        self._window = window
        self._lock = threading.Lock()

    def send(self, data: bytes, tensors: list[torch.Tensor] | None = None, *, is_async: bool = False) -> None:
        """Sends `data` as a call's pickle."""
        assert self._credits.acquire(timeout=_TIMEOUT), "the server no longer answers"
        self.sent += 1
        try:
            future = rpc.api._invoke_rpc_python_udf(
                rpc.get_worker_info(SERVER), data, tensors or [], _TIMEOUT, is_async
            )
        except RuntimeError as error:
            # The attacker's own torch refused to send it.
            self.sent -= 1
            self._credits.release()
            raise AssertionError(f"not sent: {error}") from None
        future.add_done_callback(self._take)

    def call(self, function: Any, *args: Any) -> None:
        """Sends a call as torch pickles it."""
        data, tensors = rpc.internal.serialize(rpc.internal.PythonUDF(function, args, {}))
        self.send(data, tensors, is_async=hasattr(function, "_wrapped_async_rpc_function"))

    def wait(self) -> None:
        """Until every request is answered."""
        for _ in range(self._window):
            assert self._credits.acquire(timeout=_TIMEOUT), "the server no longer answers"
        self._credits.release(self._window)

    def _take(self, future: Any) -> None:
        try:
            value = future.value()
            with self._lock:
                self.values.append(value)
        except Exception as error:  # noqa: BLE001 - torch raises any error of the peer
            with self._lock:
                self.failures.append(str(error))
        self._credits.release()


def pickled(value: Any, protocol: int = 4) -> bytes:
    """Bytes of a call with the argument `value`, which may have a hostile `__reduce__`."""
    from eagle_rpc.rpc.link import hosted_rref

    file = io.BytesIO()
    pickle.Pickler(file, protocol).dump(rpc.internal.PythonUDF(hosted_rref, (value,), {}))
    return file.getvalue()


class Gadget:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._reduced = (function, args)

    def __reduce__(self) -> Any:
        return self._reduced
