"""Which parts of a target are on which device: its decoder layers in order, a run of them on each.

The embedding and whatever else runs before the layers is on the first device, the final norm and the head on
the last, so a pass visits each device once. All of it follows from the model's structure, without weights.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_rpc.errors import ConfigError
from eagle_rpc.target.capture import find_decoder_layers
from eagle_rpc.target.part_order import (
    own_tensors,
    parts_beside,
    path_to,
    require_own_weights,
    run_behind_layers,
)

# A share of bytes counts as this much less than one of time: bytes fit or do not fit, but passes follow each
# other as fast as the slowest device.
_BYTE_SLACK = 1.1
_FIELD = "topology.devices_per_target"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part of a model costs the device that it is on."""

    num_bytes: float = 0.0  # of its weights
    passed: float = 0.0  # weights that each token passes, to which its time is proportional

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.num_bytes + other.num_bytes, self.passed + other.passed)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What the weights of a target cost in bytes, and how many of its experts a token passes."""

    bytes_per_value: float
    bytes_per_layer_value: float  # of matrices in decoder layers, which may be quantised
    experts_per_token: int | None = None  # null: it has none

    def cost_of(self, part: nn.Module, *, in_layer: bool, counted: set[int]) -> Cost:
        """The cost of a part beside the weights that are `counted` (their `id`s), to which its own are added."""
        num_bytes = passed = 0.0
        for module in part.modules():
            for weight in module.parameters(recurse=False):
                is_matrix = weight.dim() > 1
                width = self.bytes_per_layer_value if in_layer and is_matrix else self.bytes_per_value
                num_bytes += 0 if id(weight) in counted else weight.numel() * width
                counted.add(id(weight))
                if is_matrix and not isinstance(module, nn.Embedding):
                    passed += weight.numel() * (self._share_of_stack(weight) if in_layer else 1.0)
            if in_layer and isinstance(module, nn.ModuleList):
                # Experts that are modules of their own. A token does not pass the others.
                idle = 1.0 - self._share_of(len(module))
                passed -= idle * sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)
        return Cost(num_bytes, passed)

    def _share_of_stack(self, weight: Tensor) -> float:
        """Of three dimensions the first one counts experts."""
        return self._share_of(weight.shape[0]) if weight.dim() == 3 else 1.0

    def _share_of(self, num_experts: int) -> float:
        return min(1.0, (self.experts_per_token or num_experts) / max(1, num_experts))


@dataclass(frozen=True, slots=True)
class Placement:
    """Parts of one model by the number of the device that they are on."""

    num_layers: tuple[int, ...]  # decoder layers of each device, in order
    costs: tuple[Cost, ...]  # of each device
    device_of: dict[str, int]  # module or tensor name -> number of its device; together the whole model
    first_layer: int = 0  # that these devices have

    @property
    def num_devices(self) -> int:
        return len(self.num_layers)

    @classmethod
    def of(
        cls, model: PreTrainedModel, num_devices: int, weights: WeightFormat, *, field: str = _FIELD
    ) -> "Placement":
        """The placement in which the largest share that any device has is smallest, as `balance` counts it.

        `model` is on the meta device, without values; `field` is the setting that errors name. Raises
        `ConfigError` for fewer layers than devices, `UnsupportedTarget` for a model whose parts do not run in a
        line: embedding, layers, head.
        """
        layers = find_decoder_layers(model)
        if num_devices > len(layers):
            rule = f"{field} must be at most the {len(layers)} decoder layers of {type(model).__name__}"
            raise ConfigError(f"{rule}, got {num_devices}")
        path, last = path_to(model, layers), num_devices - 1
        beside = dict(parts_beside(model, path))
        device_of = dict.fromkeys([*beside, *own_tensors(model, path)], 0)
        run_behind = dict.fromkeys(beside, False)
        if last:
            require_own_weights(model, layers, field)
            run_behind = run_behind_layers(model, layers, beside, field)
            device_of |= {name: last for name, behind in run_behind.items() if behind}
        counted: dict[int, set[int]] = {0: set(), last: set()}
        outside = {0: Cost(), last: Cost()}
        for name, part in beside.items():
            number = device_of[name]
            cost = weights.cost_of(part, in_layer=False, counted=counted[number])
            # Text does not pass a vision tower.
            outside[number] += cost if name in run_behind else Cost(cost.num_bytes)
        of_layers = [weights.cost_of(layer, in_layer=True, counted=set()) for layer in layers]
        behind = outside[last] if last else Cost()
        num_layers = balance(of_layers, num_devices, before=outside[0], behind=behind)
        stops = list(itertools.accumulate(num_layers))
        costs = []
        for number, (own, stop) in enumerate(zip(num_layers, stops, strict=True)):
            costs.append(sum(of_layers[stop - own : stop], outside.get(number, Cost())))
            device_of |= {f"{path}.{layer}": number for layer in range(stop - own, stop)}
        return cls(num_layers, tuple(costs), device_of)

    def layers_of(self, number: int) -> range:
        """The decoder layers of a device."""
        first = self.first_layer + sum(self.num_layers[:number])
        return range(first, first + self.num_layers[number])

    def of_stage(self, number: int, num_stages: int) -> "Placement":
        """The parts of one stage alone, when equally many of the devices belong to each: the first to stage 0."""
        size = self.num_devices // num_stages
        own = range(number * size, (number + 1) * size)
        return Placement(
            num_layers=self.num_layers[own.start : own.stop],
            costs=self.costs[own.start : own.stop],
            device_of={name: device - own.start for name, device in self.device_of.items() if device in own},
            first_layer=sum(self.num_layers[: own.start]),
        )

    def device_map(self, devices: Sequence[torch.device]) -> dict[str, torch.device]:
        """The form in which transformers takes it."""
        return {name: devices[number] for name, number in self.device_of.items()}

    def describe(self, devices: Sequence[object]) -> str:
        """The layers of each device, for the log."""
        layers = (self.layers_of(number) for number in range(self.num_devices))
        return ", ".join(
            f"layers {own[0]} to {own[-1]} on {device}" for own, device in zip(layers, devices, strict=True)
        )


@dataclass(frozen=True, slots=True)
class StagePlacement:
    """The parts of one stage of a model, and those of the others."""

    own: Placement
    elsewhere: frozenset[str]  # names of the parts of other stages; empty: this stage is the whole model
    _tied: frozenset[str]  # those of them that share weights with own parts

    @classmethod
    def of(cls, whole: Placement, outline: PreTrainedModel, number: int, num_stages: int) -> "StagePlacement":
        """`outline`: the model without values. Parts without weights, as rotary tables, belong to every stage."""
        own = whole.of_stage(number, num_stages)
        weights = dict(outline.named_parameters(remove_duplicate=False))

        def weights_of(part: str) -> set[int]:
            return {id(one) for name, one in weights.items() if name == part or name.startswith(f"{part}.")}

        elsewhere = {part: weights_of(part) for part in whole.device_of.keys() - own.device_of.keys()}
        kept = {id for part in own.device_of for id in weights_of(part)}
        tables = dict.fromkeys((part for part, needed in elsewhere.items() if not needed), 0)
        return cls(
            replace(own, device_of=own.device_of | tables),
            frozenset(elsewhere.keys() - tables.keys()),
            frozenset(part for part, needed in elsewhere.items() if needed & kept),
        )

    def device_map(self, devices: Sequence[torch.device]) -> dict[str, torch.device]:
        """Other stages' parts are on the meta device, without values."""
        return self.own.device_map(devices) | dict.fromkeys(self.elsewhere, torch.device("meta"))

    def while_loading(self, devices: Sequence[torch.device]) -> dict[str, torch.device]:
        """The same, but for a weight tied to one of another stage: transformers reads it once, for both."""
        return self.device_map(devices) | dict.fromkeys(self._tied, devices[-1])


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
