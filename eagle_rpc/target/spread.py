"""A model whose parts are on several devices: what each part is given is brought to its device.

Passes overlap by the order of their launches alone: while the second device works on one pass, the first works
on the next. So copies wait for what they copy and for nothing else, and the host waits for none of them.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from eagle_rpc.target.capture import find_decoder_layers
from eagle_rpc.target.placement import Placement


class Links(Protocol):
    """Copies between the devices of one model."""

    def bring(self, tensor: Tensor, number: int) -> Tensor:
        """The tensor on the device of this number, ready in the order of that device's current stream."""


class PlainLinks:
    """Copies that end before the next step begins: between the "devices" of a CPU there are none."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices

    def bring(self, tensor: Tensor, number: int) -> Tensor:
        return tensor.to(self._devices[number])


class StreamLinks:
    """Copies between GPUs on side streams of both.

    `Tensor.to` makes the current streams of both GPUs wait for each other. On side streams a copy waits for the
    stream that made the tensor, and the stream that reads it waits for the copy.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self._outgoing = {device: torch.cuda.Stream(device) for device in devices}
        self._incoming = {device: torch.cuda.Stream(device) for device in devices}

    def bring(self, tensor: Tensor, number: int) -> Tensor:
        source, device = tensor.device, self._devices[number]
        if source == device or source not in self._outgoing:
            # What is on the CPU stays there, as for a model on one GPU.
            return tensor
        outgoing, incoming = self._outgoing[source], self._incoming[device]
        reader = torch.cuda.current_stream(device)
        outgoing.wait_stream(torch.cuda.current_stream(source))
        with torch.cuda.stream(outgoing), torch.cuda.stream(incoming):
            brought = tensor.to(device, non_blocking=True)
        reader.wait_stream(incoming)
        # The allocator must not give away memory that a stream which it does not know still uses.
        tensor.record_stream(outgoing)
        brought.record_stream(reader)
        return brought


def links_between(devices: Sequence[torch.device]) -> Links:
    """`StreamLinks` between GPUs, otherwise `PlainLinks`."""
    return StreamLinks(devices) if all(device.type == "cuda" for device in devices) else PlainLinks(devices)


class Spread:
    """A placed model that runs over its devices whoever calls it.

    Each part behind the first device gets a hook that brings its arguments there: hidden states, rotary tables,
    masks, states that layers share. A tensor that many layers are given is copied once in a pass. While a part
    runs, its GPU is the current one: kernels in Triton, unlike torch's own, start on that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        placement: Placement,
        devices: Sequence[torch.device],
        links: Links | None = None,
    ) -> None:
        """Hooks the parts of `model`, for good. `links` None: those of `links_between`."""
        self.devices = tuple(devices)
        """In the order in which a pass visits them."""
        self._links = links or links_between(devices)
        self._last = placement.num_devices - 1
        # Weakly, so that a tensor and its copies live no longer than the pass needs them.
        self._copies: list[MutableMapping[Tensor, Tensor]] = [
            WeakTensorKeyDictionary() for _ in range(placement.num_devices)
        ]
        self._devices_before: list[int] = []
        find_decoder_layers(model)[0].register_forward_pre_hook(self._begin_pass)
        parts = dict(model.named_modules())
        for name, number in placement.device_of.items():
            if (part := parts.get(name)) is None:
                continue  # a tensor
            if number:
                part.register_forward_pre_hook(partial(self._bring_arguments, number), with_kwargs=True)
            if devices[number].type == "cuda":
                part.register_forward_pre_hook(partial(self._enter, devices[number]))
                part.register_forward_hook(self._leave, always_call=True)

    def to_last(self, tensor: Tensor) -> Tensor:
        """The tensor on the last device, where replies are made."""
        return self._brought(tensor, self._last)

    def _begin_pass(self, *unused: Any) -> None:
        # Streams that read a copy in an earlier pass are not those of this one.
        for copies in self._copies:
            copies.clear()

    def _enter(self, device: torch.device, *unused: Any) -> None:
        self._devices_before.append(torch.cuda.current_device())
        torch.cuda.set_device(device)

    def _leave(self, *unused: Any) -> None:
        torch.cuda.set_device(self._devices_before.pop())

    def _bring_arguments(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        brought = {name: self._brought(value, number) for name, value in kwargs.items()}
        return tuple(self._brought(value, number) for value in args), brought

    def _brought(self, value: Any, number: int) -> Any:
        """`value` with all tensors in it on a device. Mappings and lists, which layers may share, stay the same."""
        if isinstance(value, Tensor):
            copies = self._copies[number]
            if value not in copies:
                brought = self._links.bring(value, number)
                if brought is value:
                    return value
                copies[value] = brought
            return copies[value]
        if isinstance(value, MutableMapping):
            for key, inner in list(value.items()):
                value[key] = self._brought(inner, number)
        elif isinstance(value, list):
            value[:] = [self._brought(inner, number) for inner in value]
        elif isinstance(value, tuple):
            inner = [self._brought(one, number) for one in value]
            return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
        return value


def place_tensors(model: nn.Module, device_map: Mapping[str, torch.device]) -> None:
    """Moves what is not on the device of its part yet. A weight tied over two devices gets a copy on the second."""
    parts = dict(model.named_modules())
    for name, device in device_map.items():
        if name in parts:
            for module in parts[name].modules():
                _place_own(module, device)
        else:
            owner, _, own = name.rpartition(".")
            _place_own(parts[owner], device, only=own)


def _place_own(module: nn.Module, device: torch.device, *, only: str | None = None) -> None:
    for name, weight in list(module.named_parameters(recurse=False)):
        if weight.device != device and only in (None, name):
            # A new one: a tied weight stays where its other owner is.
            module.register_parameter(name, nn.Parameter(weight.data.to(device), requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.device != device and only in (None, name):
            module._buffers[name] = buffer.to(device)
