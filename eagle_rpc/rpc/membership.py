"""Static membership: one torchrun job, all ranks in one TensorPipe world.

torch's own rendezvous keeps the keys of a killed attempt, so restarts would find each other's leftovers; here every
attempt has a namespace of its own in the store.
"""

import contextlib
import logging
import socket
import struct
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import rpc
from torch.distributed.rendezvous import register_rendezvous_handler

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConfigError, WaitTimeout
from eagle_rpc.rpc.watchdog import watchdog
from eagle_rpc.topology import Cast, DevicePlan, World, bind_to_interface

logger = logging.getLogger(__name__)

_SCHEME = "eagle-rpc"
_SIOCGIFADDR = 0x8915
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 10.0


class StaticMembership:
    """A joined world: the store that all workers share, and the marks they leave in it."""

    def __init__(self, cast: Cast, store: dist.Store) -> None:
        self.cast = cast
        self.store = store

    def mark(self, event: str) -> None:
        """Tells everybody that `event` has happened to this worker."""
        self.store.set(f"{self.cast.me.name}/{event}", "1")

    def wait_for(self, names: tuple[str, ...], event: str, *, timeout: float | None) -> None:
        """Blocks until all `names` have marked `event`; says every ten seconds whom it waits for.

        Raises `WaitTimeout` after `timeout` seconds. null only where the launcher ends this worker when a peer dies.
        """
        started = last_report = time.monotonic()
        missing = list(names)
        while missing := [name for name in missing if not self.store.check([f"{name}/{event}"])]:
            now = time.monotonic()
            if timeout is not None and now - started > timeout:
                raise WaitTimeout(f"{', '.join(missing)} not {event} within {timeout:.0f} s")
            if timeout is not None and now - last_report > _REPORT_SECONDS:
                logger.info("waiting for %s to be %s (%.0f s)", ", ".join(missing), event, now - started)
                last_report = now
            time.sleep(_POLL_SECONDS)

    def group_store(self, name: str) -> dist.Store:
        """A namespace for a process group among some of the workers."""
        return dist.PrefixStore(name, self.store)


@contextlib.contextmanager
def join(cast: Cast, world: World, config: RpcConfig, devices: DevicePlan) -> Iterator[StaticMembership]:
    """Starts this worker's RPC agent, and ends it with the others when the body ends well.

    After an exception the agent ends alone and at once: peers may be gone. Raises `ConfigError` if the agent listens
    on another address than `config.interface` has; ends the process if workers are missing after `start_timeout`.
    """
    address = interface_address(config.interface)
    bind_to_interface(config.interface)
    store = attempt_store(world, timeout=config.start_timeout)
    _init_rpc(cast, store, config, devices)
    graceful = False
    try:
        check_bound_address(rpc.api._get_current_rpc_agent().store.get(f"addrs/{cast.me.name}").decode(), address)
        logger.info("joined %s on %s", ", ".join(cast.names), address)
        yield StaticMembership(cast, store)
        graceful = True
    finally:
        with watchdog(config.shutdown_timeout, "RPC shutdown"):
            rpc.shutdown(graceful=graceful)


def attempt_store(world: World, *, timeout: float) -> dist.Store:
    """The store that torchrun hosts (or rank 0, where it does not), in this attempt's namespace."""
    if not world.launched:
        return dist.HashStore()
    assert world.master_addr is not None
    tcp = dist.TCPStore(
        world.master_addr,
        world.master_port,
        is_master=world.rank == 0 and not world.agent_hosts_store,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
    )
    return dist.PrefixStore(f"eagle_rpc/{world.run_id}/{world.restart_count}", tcp)


# init_rpc takes no store, only a URL, so the handler of our scheme hands over what `_init_rpc` left here.
_next_rendezvous: list[tuple[dist.Store, int, int]] = []


def _rendezvous(_url: str, **_settings: object) -> Iterator[tuple[dist.Store, int, int]]:
    yield _next_rendezvous.pop()


register_rendezvous_handler(_SCHEME, _rendezvous)


def _init_rpc(cast: Cast, store: dist.Store, config: RpcConfig, devices: DevicePlan) -> None:
    rank = cast.names.index(cast.me.name)
    _next_rendezvous.append((dist.PrefixStore("agents", store), rank, len(cast.names)))
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"{_SCHEME}://",
        num_worker_threads=config.worker_threads,
        rpc_timeout=config.request_timeout,
        _transports=config.transports,
    )
    if devices.device_maps:
        # An agent that finds CUDA uninitialised aborts the process.
        torch.cuda.init()
    for peer, device_map in devices.device_maps.items():
        options.set_device_map(peer, device_map)
    with watchdog(config.start_timeout, f"joining {len(cast.names)} workers over RPC"), warnings.catch_warnings():
        # torch warns of its own use of a gloo backend; nothing here can change it.
        warnings.filterwarnings("ignore", message="You are using a Backend")
        rpc.init_rpc(cast.me.name, rank=rank, world_size=len(cast.names), rpc_backend_options=options)


def interface_address(interface: str) -> str:
    """IPv4 address of a network interface. Raises `ConfigError` if there is none: torch would silently take loopback."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            raise ConfigError(
                f"rpc.interface must be a network interface with an IPv4 address, got {interface!r} ({error})"
            ) from None
    return socket.inet_ntoa(answer[20:24])


def check_bound_address(url: str, address: str) -> None:
    """Raises `ConfigError` unless the agent's `url` (`transport://host:port`, several joined by `;`) is on `address`."""
    hosts = {part.split("://")[-1].rsplit(":", 1)[0] for part in url.split(";") if "://" in part}
    if hosts != {address}:
        raise ConfigError(f"rpc.interface has address {address}, but RPC listens on {', '.join(sorted(hosts))}")
