"""One stage of a target whose decoder layers are spread over several processes: the layers that run in this one.

The model's own code runs whole in every stage, with the same ids: so masks, positions and rotary tables are those
of one process. What belongs to other stages does nothing and has no values. The hidden states behind the stage
before take the place of those that arrive at the first own layer; those behind the last own layer are handed on.

Legend: B batch, T sequence, H target hidden.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.target.capture import find_base, find_decoder_layers, run_base
from eagle_rpc.target.part_order import FORMS_OF_OUTPUTS
from eagle_rpc.target.placement import Placement
from eagle_rpc.target.probes import FAILURES

_PROBE_TOKENS = 8


class _Seen(Exception):
    """Ends a pass whose first own layer has run."""


class Stage:
    """The own layers of a model, and what crosses to them and from them.

    Without hidden states of a stage before it, a later stage runs on states made up from the ids: for probes and
    for compilation. In a pass the embedding gives NaN instead, so that whatever a layer reads beside its hidden
    states cannot depend on weights that are elsewhere without being seen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        placement: Placement,
        elsewhere: Collection[str],
        *,
        number: int,
        count: int,
    ) -> None:
        """Changes `model` for good. `placement`: of this stage; `elsewhere`: names of what has no values here.

        Raises `UnsupportedTarget` if layers hand each other more than hidden states.
        """
        self.number, self.count = number, count
        self._owned = tuple(placement.device_of)
        self._base = find_base(model)
        layers = find_decoder_layers(model)
        self.layers = range(placement.first_layer, placement.first_layer + sum(placement.num_layers))
        """Numbers of the decoder layers that run here."""
        self._incoming: deque[Tensor] | None = None
        self._outgoing: list[Tensor] = []
        self._num_values = 0  # of the tuple that layers return; 0: they return a tensor
        own = [layers[number] for number in self.layers]
        for name in elsewhere:
            with suppress(AttributeError):  # a tensor
                self._empty(model.get_submodule(name), layers)
        device = next(own[0].parameters()).device
        self._num_values = self._form_of_outputs(own[0], device)
        self._check_hand_over(own, type(model).__name__, device)
        own[0].register_forward_pre_hook(self._take, with_kwargs=True, prepend=True)
        own[-1].register_forward_hook(self._hand_on)

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    def owns(self, name: str) -> bool:
        """Whether the tensor of this name belongs to this stage, not to another one."""
        return any(name == own or name.startswith(f"{own}.") for own in self._owned)

    @contextmanager
    def crossing(self, incoming: Sequence[Tensor] | None) -> Iterator[list[Tensor]]:
        """One pass: `incoming` hidden states, one for each piece of the batch; yields those to hand on.

        `incoming` None: there is no stage before this one, or this is a probe.
        """
        self._incoming = None if incoming is None else deque(incoming)
        outgoing: list[Tensor] = []
        self._outgoing = outgoing
        try:
            yield outgoing
        finally:
            self._incoming, self._outgoing = None, []

    # --- what is elsewhere

    def _empty(self, part: nn.Module, layers: nn.ModuleList) -> None:
        stand_in: Callable[..., Any] = _first_tensor
        if any(part is layer for layer in layers):
            stand_in = self._pass
        elif isinstance(part, nn.Embedding):
            stand_in = self._embed_nothing(part)
        part.forward = stand_in

    def _pass(self, hidden: Any = None, *unused: Any, hidden_states: Any = None, **also_unused: Any) -> Any:
        """A layer of another stage."""
        hidden = hidden_states if hidden is None else hidden
        return (hidden, None, None)[: self._num_values] if self._num_values else hidden

    def _embed_nothing(self, embedding: nn.Embedding) -> Callable[..., Tensor]:
        width, dtype = embedding.embedding_dim, embedding.weight.dtype

        def embed(ids: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
            if self._incoming is not None:
                return torch.full((1,), torch.nan, dtype=dtype, device=ids.device).expand(*ids.shape, width)
            channels_H = torch.arange(1, width + 1, device=ids.device)
            return torch.sin((ids[..., None] + 1) * channels_H * 0.7).to(dtype)

        return embed

    # --- hooks of the own layers

    def _take(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._incoming is None or self.is_first:
            return None
        given = args[0] if args else kwargs["hidden_states"]
        hidden_BTH = self._incoming.popleft()
        if hidden_BTH.shape != given.shape or hidden_BTH.dtype != given.dtype:
            rule = f"hidden states must be {given.dtype} {list(given.shape)} behind layer {self.layers.start - 1}"
            raise UnsupportedTarget(f"{rule}, got {hidden_BTH.dtype} {list(hidden_BTH.shape)}")
        return ((hidden_BTH, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BTH})

    def _hand_on(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.is_last:
            self._outgoing.append(output[0] if isinstance(output, tuple) else output)

    # --- checks at the start

    def _form_of_outputs(self, layer: nn.Module, device: torch.device) -> int:
        """How many values layers return in a tuple; 0: a tensor. Layers before the first own one are skipped over."""
        seen: list[Any] = []

        def see(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output)
            raise _Seen

        with layer.register_forward_hook(see):
            for self._num_values in FORMS_OF_OUTPUTS:
                with suppress(_Seen, *FAILURES):
                    self._probe(device)
                if seen:
                    break
        if not seen:
            raise UnsupportedTarget(
                f"{type(layer).__name__} must run on hidden states that come from another stage"
            )
        return len(seen[0]) if isinstance(seen[0], tuple) else 0

    def _check_hand_over(self, own: Sequence[nn.Module], name: str, device: torch.device) -> None:
        """Raises `UnsupportedTarget` if a layer reads more of an earlier one than its hidden states."""
        made: dict[int, Tensor] = {}  # by id: what layers returned beside hidden states
        shared: set[int] = set()  # ids of the tensors in mappings that the running layer was given

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(id(tensor) in made for tensor in _tensors([args, kwargs])):
                raise UnsupportedTarget(
                    f"{rule}, {type(module).__name__} reads another value of an earlier layer"
                )
            shared.clear()
            shared.update(map(id, _in_mappings(args, kwargs)))

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            beside = list(output[1:]) if isinstance(output, tuple) else []
            made.update((id(tensor), tensor) for tensor in _tensors(beside))
            if any(id(tensor) not in shared for tensor in _in_mappings(args, kwargs)):
                raise UnsupportedTarget(
                    f"{rule}, {type(module).__name__} writes states that later layers read"
                )

        rule = f"topology.stages_per_target must be 1 for {name}, whose layers share more than hidden states"
        with ExitStack() as hooks:
            for layer in own:
                hooks.enter_context(layer.register_forward_pre_hook(look, with_kwargs=True))
                hooks.enter_context(layer.register_forward_hook(note, with_kwargs=True))
            self._probe(device)

    @torch.inference_mode()
    def _probe(self, device: torch.device) -> None:
        run_base(self._base, torch.arange(1, _PROBE_TOKENS + 1, device=device)[None])


def _first_tensor(*args: Any, **kwargs: Any) -> Any:
    """In place of a part of another stage before or behind the layers: what it is given."""
    return next(iter(_tensors([args, kwargs])))


def _in_mappings(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return _tensors([value for value in (*args, *kwargs.values()) if isinstance(value, Mapping)])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    )
    return [tensor for one in inner for tensor in _tensors(one)]
