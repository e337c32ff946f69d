"""`job=registry`: hosts the registry of an elastic service until it is told to stop."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from eagle_rpc.config import Config
from eagle_rpc.config.texts import parse_address
from eagle_rpc.errors import ConfigError
from eagle_rpc.process import host_address, interface_address, stop_signals
from eagle_rpc.process.logs import setup_logging
from eagle_rpc.registry import Directory, IdFile, RegistryServer, load_or_create_token

logger = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Returns 0 when it was told to stop."""
    setup_logging("registry", log_format=config.run.log_format)
    with stop_signals() as stop, hosted_registry(config):
        stop.wait()
    logger.info("the registry has ended")
    return 0


@contextlib.contextmanager
def hosted_registry(config: Config) -> Iterator[None]:
    """Runs the registry in threads of this process while the body runs; makes the token file if it is absent.

    Raises `ConfigError` if `rpc.registry` is not an address of `rpc.interface` or is in use, `AccessRefused`
    if others may read the token file.
    """
    address = _address_on_interface(config.rpc.registry, config.rpc.interface)
    token_file = Path(config.rpc.token_file)
    token = load_or_create_token(token_file)
    ids = IdFile(token_file.with_name(f"{token_file.name}.last_worker_id"))
    directory = Directory(ids, ttl=config.rpc.heartbeat_interval * config.rpc.heartbeat_misses)
    with RegistryServer(address, token, directory) as server:
        logger.info("the registry listens on %s, its token is in %s", server.address, token_file)
        yield


def _address_on_interface(registry: str, interface: str) -> tuple[str, int]:
    host, port = parse_address(registry)
    expected = interface_address(interface)
    try:
        address = host_address(host)
    except OSError as error:
        rule = "rpc.registry must name a host with an IPv4 address"
        raise ConfigError(f"{rule}, got {registry} ({error.strerror})") from None
    if address != expected:
        rule = f"rpc.registry must be on rpc.interface {interface}, whose address is {expected}"
        found = registry if address == host else f"{registry}, which is {address} here"
        raise ConfigError(f"{rule}, got {found}")
    return address, port
