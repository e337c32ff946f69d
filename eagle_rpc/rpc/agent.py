"""The RPC agent of this process: started behind the fence, on one interface, shut down within a bound."""

import contextlib
import errno
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch.distributed import rpc
from torch.distributed.rendezvous import register_rendezvous_handler

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.process import bind_to_interface, interface_address
from eagle_rpc.process.watchdog import watchdog
from eagle_rpc.rpc.fence import Permissions, install_fence, probe_fence
from eagle_rpc.rpc.internals import agent_options, bound_url

_SCHEME = "eagle-rpc"


@contextlib.contextmanager
def running_agent(
    name: str,
    *,
    worker_id: int,
    world_size: int | None,
    store: dist.Store,
    config: RpcConfig,
    device_maps: Mapping[str, Mapping[str, str]],
    permissions: Permissions,
    shuts_down_together: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Runs the agent while the body runs. `world_size` None: it starts alone and adds peers later.

    `shuts_down_together` is asked after the body: whether the shutdown waits for all workers. It does not
    after an exception. Raises `ConfigError` if the agent listens on another address than `config.interface`
    has, or if the private parts of torch are not as the fence needs them. Exits the process if workers of
    `world_size` are missing after `config.start_timeout`, or if the shutdown takes longer than
    `config.shutdown_timeout`.
    """
    address = interface_address(config.interface)
    bind_to_interface(config.interface)
    install_fence(permissions)
    options = agent_options(f"{_SCHEME}://", config, cuda=bool(device_maps))
    if device_maps:
        # An agent that finds CUDA uninitialised aborts the process.
        torch.cuda.init()
    for peer, device_map in device_maps.items():
        options.set_device_map(
            peer, {torch.device(mine): torch.device(theirs) for mine, theirs in device_map.items()}
        )
    _next_rendezvous.append((store, worker_id, world_size if world_size is not None else -1))
    with (
        watchdog(config.start_timeout, f"joining {world_size or 1} workers over RPC"),
        warnings.catch_warnings(),
    ):
        # torch warns of its own use of a gloo backend, which users cannot change.
        warnings.filterwarnings("ignore", message="You are using a Backend")
        rpc.init_rpc(name, rank=worker_id, world_size=world_size, rpc_backend_options=options)
    graceful = False
    try:
        check_bound_address(bound_url(name), address)
        probe_fence()
        yield
        graceful = shuts_down_together()
    finally:
        with watchdog(config.shutdown_timeout, "RPC shutdown"):
            rpc.shutdown(graceful=graceful)


# init_rpc takes a URL instead of a store; the handler of our scheme returns the entry of `running_agent`.
_next_rendezvous: list[tuple[dist.Store, int, int]] = []


def _rendezvous(_url: str, **_settings: object) -> Iterator[tuple[dist.Store, int, int]]:
    yield _next_rendezvous.pop()


register_rendezvous_handler(_SCHEME, _rendezvous)


def listens(url: str) -> bool:
    """Whether this process still accepts connections at the agent's `url` (`transport://host:port`).

    TensorPipe closes its listener for good when a peer connects and leaves without a word, as a port scan
    does.
    """
    host, _, port = url.partition("://")[2].rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # With address reuse only a listener makes the bind fail, not its accepted connections.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def check_bound_address(url: str, address: str) -> None:
    """Raises `ConfigError` unless the agent's `url` (`transport://host:port`) is on `address`."""
    host = url.partition("://")[2].rpartition(":")[0]
    if host != address:
        raise ConfigError(f"rpc.interface has address {address}, but RPC listens on {host}")
