"""Several "cards" in the memory of one CPU: using tensors of two of them together is an error, as on GPUs."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from eagle_rpc.sizes.outline import WeightFormat
from eagle_rpc.target.placement import Placement
from eagle_rpc.target.spread import Spread

# Reads of what a tensor is, not of its values.
_FREE = {"__get__", "size", "dim", "is_floating_point", "numel", "stride", "__repr__", "__hash__", "__len__"}


class MixedCards(RuntimeError):
    """An operation on tensors of two cards."""


class Cards(TorchFunctionMode):
    """Remembers on which card each tensor is: that of its operands. A tensor made from none fits to every card.

    As links of a `Spread` it copies tensors from card to card and notes each copy as (from, to).
    """

    def __init__(self) -> None:
        super().__init__()
        self._card_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.copies: list[tuple[int, int]] = []

    def put(self, tensors: Iterable[Tensor], card: int) -> None:
        for tensor in tensors:
            self._card_of[tensor] = card

    def card_of(self, tensor: Tensor) -> int | None:
        return self._card_of.get(tensor)

    def bring(self, tensor: Tensor, number: int) -> Tensor:
        card = self.card_of(tensor)
        if card in (None, number):
            return tensor
        self.copies.append((card, number))
        brought = tensor.clone()
        self._card_of[brought] = number
        return brought

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") in _FREE:
            return result
        cards = {card for tensor in _tensors((args, kwargs)) if (card := self.card_of(tensor)) is not None}
        if len(cards) > 1:
            raise MixedCards(f"{func} on tensors of cards {sorted(cards)}")
        if cards:
            self.put(_tensors(result), cards.pop())
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def placed_on_cards(
    model: PreTrainedModel, outline: PreTrainedModel, num_cards: int
) -> tuple[Spread, Placement, Cards]:
    """`model` over so many cards; `outline`: the same model without values, on the meta device."""
    placement = Placement.of(
        outline, num_cards, WeightFormat(bytes_per_value=4, bytes_per_layer_value=4, experts_per_token=2)
    )
    cards = Cards()
    parts = dict(model.named_modules())
    for name, number in sorted(placement.device_of.items(), key=lambda one: one[1]):
        if name in parts:
            _own_tied(parts[name], cards, number)
            cards.put((*parts[name].parameters(), *parts[name].buffers()), number)
        else:
            holder, _, own = name.rpartition(".")
            cards.put([getattr(model.get_submodule(holder), own)], number)
    return Spread(model, placement, [torch.device("cpu")] * num_cards, cards), placement, cards


def _own_tied(part: nn.Module, cards: Cards, number: int) -> None:
    """A weight tied to one of another card gets a copy, as `place_tensors` makes it."""
    for module in part.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if cards.card_of(weight) not in (None, number):
                module.register_parameter(name, nn.Parameter(weight.detach().clone(), requires_grad=False))
