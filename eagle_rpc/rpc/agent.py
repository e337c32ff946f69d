"""This process's one RPC agent: started behind the fence, on the interface that was named, and ended within a bound."""

import contextlib
import errno
import socket
import warnings
from collections.abc import Iterator, Mapping

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


class AgentExit:
    """How the agent ends: at once, unless somebody who knows that all peers are there asks for a common end."""

    graceful = False


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
) -> Iterator[AgentExit]:
    """The agent while the body runs. `world_size` None: it is alone, and adds peers as it meets them.

    Raises `ConfigError` if it listens on another address than `config.interface` has, or if torch is not as the fence needs
    it; ends the process if the other workers of `world_size` are missing after `config.start_timeout`, or if the end takes
    longer than `config.shutdown_timeout`.
    """
    address = interface_address(config.interface)
    bind_to_interface(config.interface)
    install_fence(permissions)
    options = agent_options(f"{_SCHEME}://", config, cuda=bool(device_maps))
    if device_maps:
        # An agent that finds CUDA uninitialised aborts the process.
        torch.cuda.init()
    for peer, device_map in device_maps.items():
        options.set_device_map(peer, dict(device_map))
    _next_rendezvous.append((store, worker_id, world_size if world_size is not None else -1))
    with (
        watchdog(config.start_timeout, f"joining {world_size or 1} workers over RPC"),
        warnings.catch_warnings(),
    ):
        # torch warns of its own use of a gloo backend; nothing here can change it.
        warnings.filterwarnings("ignore", message="You are using a Backend")
        rpc.init_rpc(name, rank=worker_id, world_size=world_size, rpc_backend_options=options)
    end = AgentExit()
    try:
        check_bound_address(bound_url(name), address)
        probe_fence()
        yield end
    finally:
        with watchdog(config.shutdown_timeout, "RPC shutdown"):
            rpc.shutdown(graceful=end.graceful)


# init_rpc takes no store, only a URL, so the handler of our scheme hands over what `running_agent` left here.
_next_rendezvous: list[tuple[dist.Store, int, int]] = []


def _rendezvous(_url: str, **_settings: object) -> Iterator[tuple[dist.Store, int, int]]:
    yield _next_rendezvous.pop()


register_rendezvous_handler(_SCHEME, _rendezvous)


def listens(url: str) -> bool:
    """Whether this process still accepts connections at the agent's `url` (`transport://host:port`).

    TensorPipe closes its listener for good when a peer connects and leaves before it has said anything, as a port scan does.
    """
    host, _, port = url.partition("://")[2].rpartition(":")
    # With address reuse, connections that were accepted there do not count.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
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
