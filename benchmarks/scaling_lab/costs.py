"""Processor time of the parts, each alone in this process: what `model.Costs` needs."""

import time
from collections.abc import Callable
from pathlib import Path

from eagle_rpc.registry import Directory, IdFile, RegistryClient, RegistryServer
from scaling_lab.in_process import record
from scaling_lab.measurement import TOKEN, Figures, measure
from scaling_lab.model import Costs
from scaling_lab.scenario import Scenario

_LOOKS = 200
# A pass that takes no time shows what a request costs; a long one shows what waiting costs.
_SHORT, _QUIET = 0.002, 3.0


def _alone(directory: str, *, forward: float, interval: float, targets: int) -> Figures:
    scenario = Scenario(
        targets=targets,
        trainers=1,
        forward=forward,
        load=1e6,
        prefetch=8,
        neighbours=16,
        tokens=16,
        hidden_size=16,
        failures=0.0,
        outage=0.0,
        heartbeat_interval=interval,
        seconds=5.0,
    )
    return measure(scenario, directory, warm_up=1.0)


def request_costs(directory: str, targets: int) -> tuple[float, float]:
    """Of a dispatcher with so many targets, and of a server: processor seconds a request."""
    figures = _alone(directory, forward=_SHORT, interval=10.0, targets=targets)
    return figures.dispatcher / 1e3, figures.server / 1e3


def registry_costs(directory: str, workers: int) -> dict[str, float]:
    """Of one look-up among so many workers at both ends: the list, the list unchanged, and a beat."""
    host = Directory(IdFile(Path(directory) / f"ids{workers}"), ttl=3600.0)
    entries = [record(f"target{index}", "target", index + 1) for index in range(workers)]
    for entry in entries:
        host.announce(entry)
    server = RegistryServer(("127.0.0.1", 0), TOKEN, host)

    def mean(look: Callable[[], object]) -> float:
        look()
        before = time.process_time()
        for _ in range(_LOOKS):
            look()
        return (time.process_time() - before) / _LOOKS

    known = RegistryClient(server.address, TOKEN, timeout=30.0)
    costs = {
        "list": mean(lambda: RegistryClient(server.address, TOKEN, timeout=30.0).living()),
        "unchanged": mean(known.living),
        "beat": mean(lambda: known.announce(entries[0])),
    }
    server.close()
    return costs


def costs_of(directory: str) -> Costs:
    dispatcher, server = request_costs(directory, 16)
    looks = registry_costs(directory, 64)
    return Costs(
        dispatcher=dispatcher,
        server=server,
        heartbeat=_heartbeat(directory),
        look_up=max(looks["unchanged"], looks["beat"]),
    )


def _heartbeat(directory: str) -> float:
    """From the idle cost of a trainer at 16 targets with and without frequent heartbeats."""
    interval, tick = 0.5, 0.1
    often, rarely = (
        _alone(directory, forward=_QUIET, interval=seconds, targets=16) for seconds in (interval, 10.0)
    )
    # An answer is looked at with the next tick of the dispatcher, and then the interval begins anew.
    share = max(0.0, often.dispatcher_share - rarely.dispatcher_share)
    return share * (interval + tick) / 16
