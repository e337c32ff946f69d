"""A WireGuard tunnel between hosts, made by `deploy/wireguard.sh`."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.documents import ROOT
from support.hosts import Host

TUNNEL = "wg0"
_SCRIPT = str(ROOT / "deploy" / "wireguard.sh")


def missing_wireguard() -> str:
    """The reason why this machine makes no tunnel, "" if it does."""
    if shutil.which("wg") is None:
        return "needs wg (wireguard-tools)"
    kernel = "unshare --net ip link add dev wg0 type wireguard".split()
    if shutil.which("wireguard-go") is None and subprocess.run(kernel, capture_output=True).returncode:
        return "needs the kernel's wireguard, or wireguard-go"
    return ""


@dataclass(frozen=True)
class Tunnel:
    """Hosts with an address in the tunnel each."""

    addresses: dict[str, str]  # by host's name
    said: str  # everything that the script has printed on the way
    secrets: list[str]  # private keys

    def address_of(self, host: Host) -> str:
        return self.addresses[host.name]


@contextlib.contextmanager
def tunnel_between(hosts: Sequence[Host], directory: Path) -> Iterator[Tunnel]:
    """A tunnel while the body runs; private keys lie in `directory`."""
    keys = {host.name: directory / f"{host.name}.key" for host in hosts}
    public = {host.name: _run(host, keys, "key").strip() for host in hosts}
    addresses = {host.name: f"10.99.0.{number}" for number, host in enumerate(hosts, 1)}
    with contextlib.ExitStack() as stack:
        said = list(public.values())
        for host in hosts:
            others = [other for other in hosts if other is not host]
            peers = [(public[one.name], one.address, addresses[one.name]) for one in others]
            words = [word for peer in peers for word in peer]
            said.append(_run(host, keys, "up", addresses[host.name], *words))
            stack.callback(_run, host, keys, "down")
        yield Tunnel(addresses, "\n".join(said), [key.read_text().strip() for key in keys.values()])


def _run(host: Host, keys: dict[str, Path], *words: str) -> str:
    return host.run("env", f"KEY={keys[host.name]}", f"INTERFACE={TUNNEL}", "sh", _SCRIPT, *words)
