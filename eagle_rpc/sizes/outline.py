"""The structure of a target in numbers: what its parts weigh, and which devices its layers go to.

The embedding and whatever else runs before the layers is on the first device, the final norm and the head on
the last, so a pass visits each device once.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eagle_rpc.config.choices import Quantization
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.sizes.target import TargetShape

# A share of bytes counts as this much less than one of time: bytes fit or do not fit, but passes follow each
# other as fast as the slowest device.
_BYTE_SLACK = 1.1
DEVICES_FIELD = "topology.devices_per_target"
_BITS = {Quantization.fp8: 8, Quantization.int8: 8, Quantization.int8_weights: 8, Quantization.nf4: 4}
# Of methods whose stored configuration names no `bits`, by the beginning of their names. mxfp4 adds 8 bits to 32.
_STORED_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "finegrained_fp8": 8.0, "mxfp4": 4.25}


@dataclass(frozen=True, slots=True)
class Part:
    """Weights of a part of a model, in numbers of values."""

    matrices: float = 0.0
    others: float = 0.0  # in vectors
    passed: float = 0.0  # in matrices that each token passes, to which its time is proportional

    def __add__(self, other: "Part") -> "Part":
        return Part(self.matrices + other.matrices, self.others + other.others, self.passed + other.passed)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part of a model costs the device that it is on."""

    num_bytes: float = 0.0  # of its weights
    passed: float = 0.0  # as of `Part`

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.num_bytes + other.num_bytes, self.passed + other.passed)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What the weights of a target cost in bytes, and how many of its experts a token passes."""

    bytes_per_value: float
    bytes_per_layer_value: float  # of matrices in decoder layers, which may be quantised
    experts_per_token: int | None = None  # null: it has none

    @classmethod
    def of(
        cls, config: TargetConfig, quantization: Mapping[str, Any] | None, experts_per_token: int | None
    ) -> "WeightFormat":
        """Of quantised weights their bits alone; `quantization`: as the model is stored, null: not quantised."""
        return cls(
            bytes_per_value=config.dtype.num_bytes,
            bytes_per_layer_value=_layer_bits(config, quantization) / 8,
            experts_per_token=experts_per_token,
        )

    def cost(self, part: Part, *, in_layer: bool) -> Cost:
        """The cost of a part in or beside a decoder layer."""
        per_matrix = self.bytes_per_layer_value if in_layer else self.bytes_per_value
        return Cost(part.matrices * per_matrix + part.others * self.bytes_per_value, part.passed)


def _layer_bits(config: TargetConfig, stored: Mapping[str, Any] | None) -> float:
    """Bits of a value of the matrices in decoder layers, without scales; of unknown methods those of the dtype."""
    plain = 8.0 * config.dtype.num_bytes
    if config.quantization is not None:
        return _BITS[config.quantization]
    if stored is None:
        return plain
    if stored.get("load_in_4bit"):
        return 4.0
    if stored.get("load_in_8bit"):
        return 8.0
    return float(stored.get("bits") or _STORED_BITS.get(str(stored.get("quant_method")), plain))


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """Decoder layers by the number of the device that they are on, in order."""

    num_layers: tuple[int, ...]  # of each device
    costs: tuple[Cost, ...]  # of each device
    first_layer: int = 0  # that these devices have

    @property
    def num_devices(self) -> int:
        return len(self.num_layers)

    def layers_of(self, number: int) -> range:
        """The decoder layers of a device."""
        first = self.first_layer + sum(self.num_layers[:number])
        return range(first, first + self.num_layers[number])


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """A model of transformers without its weights."""

    name: str  # of its class
    num_parameters: int
    layers: tuple[Part, ...]
    whole: Part  # beside the layers, each weight counted once
    before: Part  # of it on the first of several devices
    behind: Part  # and on the last; weights that both use count for both
    undivided: str | None  # why it cannot be on several devices, to follow its name; null: it can

    def divided(self, num_devices: int, weights: WeightFormat, *, field: str = DEVICES_FIELD) -> Division:
        """The division in which the largest share that any device has is smallest, as `balance` counts it.

        `field` is the setting that errors name. Raises `ConfigError` for fewer layers than devices,
        `UnsupportedTarget` for a model whose parts do not run in a line: embedding, layers, head.
        """
        if num_devices > len(self.layers):
            rule = f"{field} must be at most the {len(self.layers)} decoder layers of {self.name}"
            raise ConfigError(f"{rule}, got {num_devices}")
        if num_devices > 1 and self.undivided is not None:
            raise UnsupportedTarget(f"{field} must be 1 for {self.name}, {self.undivided}")
        parts = (self.whole, Part()) if num_devices == 1 else (self.before, self.behind)
        before, behind = (weights.cost(part, in_layer=False) for part in parts)
        layers = [weights.cost(layer, in_layer=True) for layer in self.layers]
        num_layers = balance(layers, num_devices, before=before, behind=behind)
        stops = list(itertools.accumulate(num_layers))
        costs = [sum(layers[stop - own : stop], Cost()) for own, stop in zip(num_layers, stops, strict=True)]
        costs[0] += before
        costs[-1] += behind
        return Division(num_layers=num_layers, costs=tuple(costs))


def balance(layers: Sequence[Cost], num_devices: int, *, before: Cost, behind: Cost) -> tuple[int, ...]:
    """Numbers of layers for each device: the largest share of all time, or of all bytes less a tenth, is smallest.

    `before` is on the first device, `behind` on the last. Exact: all cuts, by dynamic programming.
    """
    whole = sum(layers, before + behind)
    sums = list(itertools.accumulate(layers, initial=Cost()))

    def share(start: int, stop: int) -> float:
        num_bytes = sums[stop].num_bytes - sums[start].num_bytes
        passed = sums[stop].passed - sums[start].passed
        if start == 0:
            num_bytes, passed = num_bytes + before.num_bytes, passed + before.passed
        if stop == len(layers):
            num_bytes, passed = num_bytes + behind.num_bytes, passed + behind.passed
        return max(num_bytes / _BYTE_SLACK / (whole.num_bytes or 1.0), passed / (whole.passed or 1.0))

    # By number of layers: the largest share, the sum of squares that decides between equals, and the cuts before it.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for device in range(1, num_devices + 1):
        left = num_devices - device
        stops = range(device, len(layers) - left + 1) if left else (len(layers),)
        reached = {}
        for stop in stops:
            candidates = (
                (max(most, cost), squares + cost**2, (*cuts, stop - start))
                for start, (most, squares, cuts) in best.items()
                if start < stop
                for cost in [share(start, stop)]
            )
            reached[stop] = min(candidates)
        best = reached
    return best[len(layers)][2]


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetSizes:
    """What a plan needs to know of a target."""

    shape: TargetShape
    outline: Outline
    sdpa: bool  # whether `target.attention=sdpa` computes what the model computes
    quantization: Mapping[str, Any] | None  # as it is stored; null: not quantised
