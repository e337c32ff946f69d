"""EAGLE-3 drafts on disk that a training may start from: ours, and those of other trainers.

| form | differs from an export of ours in |
|---|---|
| SpecForge, EAGLE | no embedding, further keys in `config.json` |
| NeMo AutoModel | names begin with `model.`, the layer is `layers.0`, the draft vocabulary is not sorted |
| speculators | the layer is `layers.0`, `config.json` has the layer's keys in `transformer_layer_config` |

Legend: H hidden, K draft vocab.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.errors import CheckpointError, InvalidRequest
from eagle_rpc.serving.export import EMBEDDING, weight_shapes
from eagle_rpc.serving.plain_config import AUX_LAYERS
from eagle_rpc.supervision import VocabMapping, tensors_digest

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"
_D2T, _T2D = "d2t", "t2d"
# Values of `config.json` that change what the weights mean, and that no shape shows.
_SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
# Relative distance of the same embedding in two formats.
_ROUNDING = 0.01
# Values that training can adapt to.
_ADAPTABLE = ("rope_theta", "rms_norm_eps")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredDraft:
    """A draft whose names and shapes are known and whose weights are read on demand."""

    directory: Path
    shapes: dict[str, tuple[int, ...]]  # by our names, without the embedding
    mapping: VocabMapping
    aux_layer_ids: tuple[int, ...] | None  # counted after the layer; None: the target's default layers
    switches: dict[str, bool]
    adaptable: dict[str, Any]
    _places: dict[str, tuple[Path, str]]  # file and stored name of each tensor
    _head_rows: Tensor  # [K] int64, the stored row of each draft id of `mapping`
    _embedding: tuple[Path, str] | None  # the place of its embedding: the target's, or one that was trained

    @classmethod
    def open(cls, directory: Path) -> "StoredDraft":
        """Reads `config.json` and the headers of all `*.safetensors`. Raises `CheckpointError` naming file and rule."""
        raw, layer = _read_config(directory / "config.json")
        places = _places_of(directory)
        embedding = places.pop(EMBEDDING, None)
        shapes = {name: _shape(place) for name, place in places.items()}
        if HEAD not in shapes:
            raise CheckpointError(f"{directory} must hold {HEAD}, which is missing")
        rows = shapes[HEAD][0]
        offsets_K = torch.zeros(rows, dtype=torch.int64)
        if _D2T in places:
            offsets_K = _read(places[_D2T]).long()
        ids_K = offsets_K + torch.arange(len(offsets_K))
        vocab_size = layer.get("vocab_size") or raw.get("vocab_size") or rows
        try:
            mapping = VocabMapping.from_token_ids(ids_K, vocab_size)
        except InvalidRequest as error:
            raise CheckpointError(
                f"{directory}: d2t must hold offsets to distinct target ids: {error}"
            ) from error
        if len(mapping) != rows:
            raise CheckpointError(
                f"{directory}: d2t must name {rows} tokens, the rows of {HEAD}, got {len(mapping)}"
            )
        # speculators: an absent key means true there.
        absent = {"norm_before_residual": "speculators_model_type" in raw}
        inner = raw.get("eagle_config") or {}
        return cls(
            directory=directory,
            shapes={name: shape for name, shape in shapes.items() if name not in (_D2T, _T2D)},
            mapping=mapping,
            aux_layer_ids=_aux_layers(raw, inner, shapes.get("fc.weight")),
            switches={
                name: bool(raw.get(name, inner.get(name, absent.get(name, False)))) for name in _SWITCHES
            },
            adaptable={name: _value(layer, name) for name in _ADAPTABLE},
            _places={name: places[name] for name in places if name not in (_D2T, _T2D)},
            _head_rows=ids_K.argsort(),
            _embedding=embedding,
        )

    def require_fit(self, config: Eagle3DraftConfig, aux_layer_ids: tuple[int, ...]) -> None:
        """Raises `CheckpointError` for the first name, shape or value that `config` does not have.

        The head may have another number of rows; `load_into` maps them.
        """
        place = f"draft.init_from={self.directory}"
        if self.mapping.target_vocab_size != config.vocab_size:
            raise CheckpointError(
                f"{place} must be of a target with {config.vocab_size} tokens, "
                f"got {self.mapping.target_vocab_size}"
            )
        for name, stored in self.switches.items():
            if stored != getattr(config, name, False):
                raise CheckpointError(
                    f"draft.{name} must be {str(stored).lower()}, as {place} was trained, "
                    f"got {str(not stored).lower()}"
                )
        if self.aux_layer_ids not in (None, aux_layer_ids):
            raise CheckpointError(
                f"target.aux_layer_ids must be {list(self.aux_layer_ids or ())}, which {place} reads, "
                f"got {list(aux_layer_ids)}"
            )
        expected = {name: shape for name, shape in weight_shapes(config).items() if name != EMBEDDING}
        for name in sorted(expected.keys() | self.shapes.keys()):
            found = self.shapes.get(name)
            if found is None:
                raise CheckpointError(f"{place} must hold {name}, which is missing")
            if name not in expected:
                raise CheckpointError(f"{place} must hold this run's weights alone, got {name} as well")
            wanted = expected[name]
            if (found[1:] if name == HEAD else found) != (wanted[1:] if name == HEAD else wanted):
                raise CheckpointError(f"{place}: {name} must have shape {list(wanted)}, got {list(found)}")
        for name, value in self.adaptable.items():
            if value not in (None, getattr(config, name)):
                logger.warning(
                    "%s was trained with %s=%s, this run has %s", place, name, value, getattr(config, name)
                )

    @torch.no_grad()
    def load_into(self, draft: Eagle3Draft, mapping: VocabMapping) -> None:
        """Copies all weights into a draft of the vocabulary `mapping`, which `require_fit` has accepted.

        Rows of the head whose tokens this draft lacks stay as they are.
        """
        self._load_embedding(draft)
        parameters = dict(draft.named_parameters())
        for name in self.shapes:
            if name != HEAD:
                parameters[name].copy_(_read(self._places[name]))
        head_KH = _read(self._places[HEAD])[self._head_rows]
        stored_K = self.mapping.draft_ids[mapping.selected_token_ids]
        known_K = stored_K >= 0
        parameters[HEAD][known_K] = head_KH[stored_K[known_K]].to(parameters[HEAD])
        logger.info(
            "the draft starts from %s; %d of %d rows of its head are from there",
            self.directory,
            int(known_K.sum()),
            len(mapping),
        )

    def _load_embedding(self, draft: Eagle3Draft) -> None:
        """A draft that trains its embedding begins with the stored one; another keeps the target's."""
        if self._embedding is None:
            return
        stored_VH, mine_VH = _read(self._embedding).float(), draft.embed_tokens.weight
        if stored_VH.shape != mine_VH.shape:
            logger.warning(
                "the embedding of draft.init_from=%s has another shape and is left", self.directory
            )
        elif mine_VH.requires_grad:
            mine_VH.copy_(stored_VH)
        elif (stored_VH - mine_VH.float()).norm() > _ROUNDING * mine_VH.float().norm():
            logger.warning(
                "draft.init_from=%s was trained with an embedding of its own, in whose place the target's comes; "
                "draft.train_embeddings=true takes it over",
                self.directory,
            )

    @property
    def digest(self) -> str:
        """SHA-256 of weights, a stored embedding and draft vocabulary: they identify the draft wherever it lies."""
        places = self._places | ({} if self._embedding is None else {EMBEDDING: self._embedding})
        tensors = ((name, _read(place)) for name, place in sorted(places.items()))
        return tensors_digest([*tensors, ("selected_token_ids", self.mapping.selected_token_ids)])


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole content, and the part that describes the layer."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be the JSON file of an EAGLE-3 draft: {error}") from error
    layer = raw.get("transformer_layer_config", raw) if isinstance(raw, dict) else None
    if not isinstance(layer, dict):
        raise CheckpointError(f"{path} must hold a JSON object that describes a draft, got {raw!r:.60}")
    kind = raw.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise CheckpointError(f"{path}: speculators_model_type must be eagle3, got {kind}")
    return raw, layer


def _value(layer: dict[str, Any], name: str) -> Any:
    """A value of the configuration; transformers 5 keeps those of rotary embeddings together."""
    return layer.get(name, (layer.get("rope_parameters") or {}).get(name))


def _aux_layers(
    raw: dict[str, Any], inner: dict[str, Any], fc_shape: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Captured layers counted after the layer: as vLLM writes them, else as SGLang does.

    speculators adds one that `fc` does not read: the target's last hidden state.
    """
    before_layer, after_layer = raw.get(AUX_LAYERS), inner.get(AUX_LAYERS)
    if before_layer is None:
        return None if after_layer is None else tuple(after_layer)
    layers = tuple(layer - 1 for layer in before_layer)
    if "speculators_model_type" in raw and fc_shape is not None:
        layers = layers[: fc_shape[1] // fc_shape[0]]
    return layers


def _places_of(directory: Path) -> dict[str, tuple[Path, str]]:
    """File and stored name of each tensor, by our name; without copies of the target's parts."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} must hold safetensors files, got none")
    places: dict[str, tuple[Path, str]] = {}
    for file in files:
        for stored in _names(file):
            name = stored.removeprefix("model.")
            if name.startswith("layers.0."):
                name = f"midlayer.{name.removeprefix('layers.0.')}"
            if not name.startswith("verifier_"):
                places[name] = (file, stored)
    return places


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} must be a whole safetensors file, got {error}") from error


def _shape(place: tuple[Path, str]) -> tuple[int, ...]:
    with safe_open(place[0], framework="pt") as tensors:
        return tuple(tensors.get_slice(place[1]).get_shape())


def _read(place: tuple[Path, str]) -> Tensor:
    with safe_open(place[0], framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(place[1])
    return tensor
