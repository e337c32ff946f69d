"""The outline of a model, counted in its modules on the meta device: the values of each part, and where it runs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.sizes.outline import Outline, Part
from eagle_rpc.target.capture import find_decoder_layers
from eagle_rpc.target.part_order import parts_beside, path_to, require_own_weights, run_behind_layers


class Structure:
    """The parts of a model on the meta device, and whether they run before or behind its decoder layers.

    Raises as `find_decoder_layers`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._layers = model, find_decoder_layers(model)
        self.path = path_to(model, self._layers)
        self.beside = dict(parts_beside(model, self.path))
        self.run_behind: dict[str, bool] = {}
        """Of each part beside the layers that text passes, as the embedding and the head."""
        self._undivided: str | None = None
        try:
            require_own_weights(self._layers)
            self.run_behind = run_behind_layers(model, self._layers, self.beside)
        except UnsupportedTarget as error:
            self._undivided = str(error)

    def outline(self, experts_per_token: int | None) -> Outline:
        """The model in numbers. `experts_per_token`: null, it has none."""
        weights, share = _Weights(experts_per_token), self._share
        return Outline(
            name=type(self._model).__name__,
            num_parameters=self._model.num_parameters(),
            layers=tuple(weights.of(layer, in_layer=True, counted=set()) for layer in self._layers),
            whole=share(weights, self.beside),
            before=share(weights, [name for name in self.beside if not self.run_behind.get(name)]),
            behind=share(weights, [name for name in self.beside if self.run_behind.get(name)]),
            undivided=self._undivided,
        )

    def _share(self, weights: "_Weights", names: Iterable[str]) -> Part:
        """The parts with these names, on one device."""
        share, counted = Part(), set[int]()
        for name in names:
            part = weights.of(self.beside[name], in_layer=False, counted=counted)
            # Text does not pass a vision tower.
            share += part if name in self.run_behind else replace(part, passed=0.0)
        return share


@dataclass(frozen=True, slots=True)
class _Weights:
    """Counts weights of modules."""

    experts_per_token: int | None

    def of(self, part: nn.Module, *, in_layer: bool, counted: set[int]) -> Part:
        """The values of a part without weights that are `counted` (their `id`s), to which its own are added."""
        matrices = others = passed = 0.0
        for module in part.modules():
            for weight in module.parameters(recurse=False):
                is_matrix, is_new = weight.dim() > 1, id(weight) not in counted
                counted.add(id(weight))
                matrices += weight.numel() * (is_matrix and is_new)
                others += weight.numel() * (is_new and not is_matrix)
                if is_matrix and not isinstance(module, nn.Embedding):
                    passed += weight.numel() * (self._share_of_stack(weight) if in_layer else 1.0)
            if in_layer and isinstance(module, nn.ModuleList):
                # Experts that are modules of their own. A token does not pass the others.
                idle = 1.0 - self._share_of(len(module))
                passed -= idle * sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)
        return Part(matrices, others, passed)

    def _share_of_stack(self, weight: Tensor) -> float:
        """Of three dimensions the first one counts experts."""
        return self._share_of(weight.shape[0]) if weight.dim() == 3 else 1.0

    def _share_of(self, num_experts: int) -> float:
        return min(1.0, (self.experts_per_token or num_experts) / max(1, num_experts))
