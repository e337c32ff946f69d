"""What a service of any size should do, from a few measured costs: no part of it runs anything.

A closed network: batches go from trainers to targets and back. With several requests under way and passes of
similar length its rate is the smallest of its stations' rates; each bound below is one station.
"""

from dataclasses import dataclass

from scaling_lab.scenario import Scenario

GBIT = 1e9 / 8


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Processor seconds, measured by `scaling_lab.costs`; rates of links in bytes a second."""

    dispatcher: float  # a request, on the trainer's dispatch thread
    server: float  # a request, on the forward thread beside the pass
    heartbeat: float  # on the dispatch thread, without RPC
    look_up: float  # an unchanged list, or a beat; both ends, so an upper bound for the registry
    rpc_call: float = (
        0.4e-3  # of a small call over uv, at each end; the time that it takes there is an upper bound
    )
    link: float = 10 * GBIT  # of a host, which has one target or one trainer


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Batches a second, and the station that bounds them."""

    rate: float
    efficiency: float
    bottleneck: str
    trainer_idle_share: float  # of a processor, for heartbeats
    target_idle_share: float
    registry_share: float


def predict(scenario: Scenario, costs: Costs) -> Prediction:
    """The rates of all stations, the smallest of which counts; shares are of one processor (one GIL)."""
    links = min(scenario.neighbours, scenario.targets)
    beats = 1 / scenario.heartbeat_interval
    per_target = scenario.trainers * links / scenario.targets
    heartbeat = costs.heartbeat + costs.rpc_call
    trainer_idle = links * beats * heartbeat
    target_idle = per_target * beats * heartbeat
    # Each trainer looks up and beats, each target beats.
    registry = (2 * scenario.trainers + scenario.targets) * beats * costs.look_up
    up = 1 - min(1.0, scenario.failures * scenario.outage / scenario.targets)
    stations = {
        "targets": scenario.targets * up / (scenario.forward + costs.server),
        "trainers": scenario.trainers / scenario.train,
        "links of targets": scenario.targets * costs.link / scenario.reply_bytes,
        "links of trainers": scenario.trainers * costs.link / scenario.reply_bytes,
        "dispatchers": scenario.trainers * max(0.0, 1 - trainer_idle) / costs.dispatcher,
        "targets' interpreters": scenario.targets * max(0.0, 1 - target_idle) / costs.server,
    }
    bottleneck = min(stations, key=lambda name: stations[name])
    ideal = scenario.targets / scenario.forward * min(1.0, scenario.load)
    if registry > 1:
        bottleneck = "registry"
    return Prediction(
        rate=stations[min(stations, key=lambda name: stations[name])],
        efficiency=min(stations.values()) / ideal,
        bottleneck=bottleneck,
        trainer_idle_share=trainer_idle,
        target_idle_share=target_idle,
        registry_share=registry,
    )
