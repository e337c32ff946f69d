"""Which parts of a target are on which device: its decoder layers in order, a run of them on each.

The embedding and whatever else runs before the layers is on the first device, the final norm and the head on
the last, so a pass visits each device once. All of it follows from the model's structure, without weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from eagle_rpc.sizes.outline import DEVICES_FIELD, Division, WeightFormat
from eagle_rpc.target.part_order import own_tensors
from eagle_rpc.target.structure import Structure


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement(Division):
    """Parts of one model by the number of the device that they are on."""

    device_of: dict[str, int]  # module or tensor name -> number of its device; together the whole model

    @classmethod
    def of(
        cls, model: PreTrainedModel, num_devices: int, weights: WeightFormat, *, field: str = DEVICES_FIELD
    ) -> "Placement":
        """The placement by `Outline.divided`, whose errors it raises.

        `model` is on the meta device, without values; `field` is the setting that errors name.
        """
        structure = Structure(model)
        outline = structure.outline(weights.experts_per_token)
        division = outline.divided(num_devices, weights, field=field)
        device_of = dict.fromkeys([*structure.beside, *own_tensors(model, structure.path)], 0)
        behind = [name for name, runs_behind in structure.run_behind.items() if runs_behind]
        device_of |= dict.fromkeys(behind, num_devices - 1)
        for number in range(num_devices):
            device_of |= {f"{structure.path}.{layer}": number for layer in division.layers_of(number)}
        return cls(num_layers=division.num_layers, costs=division.costs, device_of=device_of)

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
