"""The choice of the draft vocabulary.

Legend: V target vocab, K draft vocab.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eagle_rpc.data.dataset import ChatDataset
from eagle_rpc.data.template import special_token_ids
from eagle_rpc.errors import ConfigError, InvalidRequest
from eagle_rpc.process.files import replaced_file
from eagle_rpc.supervision.fingerprint import tokenizer_fingerprint
from eagle_rpc.supervision.vocab import VocabMapping

logger = logging.getLogger(__name__)

_SMALLEST_VOCABULARY = 1024  # of a coverage


def build_vocab_mapping(
    dataset: ChatDataset,
    *,
    tokenizer: PreTrainedTokenizerBase,
    target_vocab_size: int,
    draft_vocab_size: int,
    cache_dir: str | Path,
) -> tuple[VocabMapping, float]:
    """The K tokens of the draft vocabulary, and the share of predicted tokens that they cover.

    They are all special tokens of the tokenizer, then the most frequent predicted tokens of `dataset`, then
    the lowest unused ids. The mapping is kept in `cache_dir` under a hash of all its inputs; a damaged file
    is built anew. Raises `ConfigError` for impossible sizes, `DataError` for ids outside the target's
    vocabulary.
    """
    if not 0 < draft_vocab_size <= target_vocab_size:
        raise ConfigError(
            f"draft.vocab_size must lie in [1, {target_vocab_size}] (the target's vocabulary), "
            f"got {draft_vocab_size}"
        )
    # A tokenizer may have tokens beyond its model's vocabulary.
    special = sorted(token_id for token_id in special_token_ids(tokenizer) if token_id < target_vocab_size)
    if len(special) > draft_vocab_size:
        raise ConfigError(
            f"draft.vocab_size must have room for the tokenizer's {len(special)} special tokens, "
            f"got {draft_vocab_size}"
        )
    sizes = f"{target_vocab_size} {draft_vocab_size}"
    identity = f"{dataset.digest} {tokenizer_fingerprint(tokenizer)} {special} {sizes}"
    path = Path(cache_dir) / f"vocab-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    found = _read(path, target_vocab_size, draft_vocab_size)
    if found is None:
        found = _build(dataset, special, target_vocab_size, draft_vocab_size)
        _write(path, *found)
    mapping, coverage = found
    logger.info(
        "the draft vocabulary (%d of %d tokens) covers %.2f %% of the predicted tokens; kept in %s",
        draft_vocab_size,
        target_vocab_size,
        100 * coverage,
        path,
    )
    return mapping, coverage


def _build(
    dataset: ChatDataset, special: Sequence[int], target_vocab_size: int, draft_vocab_size: int
) -> tuple[VocabMapping, float]:
    counts_V = torch.from_numpy(dataset.token_counts(target_vocab_size)[1])
    ranking_V = counts_V.clone()
    ranking_V[list(special)] = torch.iinfo(torch.int64).max
    # A stable sort keeps equal counts, zero included, in the order of their ids.
    selected = ranking_V.sort(descending=True, stable=True).indices[:draft_vocab_size]
    mapping = VocabMapping.from_token_ids(selected, target_vocab_size)
    return mapping, _share(counts_V, mapping)


def coverage(dataset: ChatDataset, mapping: VocabMapping) -> float:
    """Share of the predicted tokens of `dataset` that the draft vocabulary has."""
    return _share(torch.from_numpy(dataset.token_counts(mapping.target_vocab_size)[1]), mapping)


def coverage_by_size(
    dataset: ChatDataset, target_vocab_size: int, draft_vocab_size: int
) -> list[tuple[int, float]]:
    """Sizes of a draft vocabulary, ascending, and the share of the predicted tokens of `dataset` that the most
    frequent ones are: powers of two, `draft_vocab_size` and the whole."""
    _, guessed_V = dataset.token_counts(target_vocab_size)
    covered = np.cumsum(np.sort(guessed_V)[::-1]) / max(1, guessed_V.sum())
    sizes = {draft_vocab_size, target_vocab_size}
    size = _SMALLEST_VOCABULARY
    while size < target_vocab_size:
        sizes.add(size)
        size *= 2
    return [(size, float(covered[size - 1])) for size in sorted(sizes)]


def _share(counts_V: Tensor, mapping: VocabMapping) -> float:
    return float(counts_V[mapping.selected_token_ids].sum() / counts_V.sum().clamp(min=1))


def _read(path: Path, target_vocab_size: int, draft_vocab_size: int) -> tuple[VocabMapping, float] | None:
    """The kept mapping; None if there is none or it is damaged."""
    try:
        kept = json.loads(path.read_bytes())
        mapping = VocabMapping.from_token_ids(torch.tensor(kept["selected_token_ids"]), target_vocab_size)
        coverage = float(kept["coverage"])
        if mapping.digest != kept["digest"] or len(mapping) != draft_vocab_size:
            raise ValueError("its digest or size does not fit its content")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, InvalidRequest) as error:
        logger.warning("%s is damaged and built anew: %s", path, error)
        return None
    return mapping, coverage


def _write(path: Path, mapping: VocabMapping, coverage: float) -> None:
    """Several trainers may write the same file at the same time."""
    kept = {
        "selected_token_ids": mapping.selected_token_ids.tolist(),
        "coverage": coverage,
        "digest": mapping.digest,
    }
    with replaced_file(path) as fresh:
        fresh.write_text(json.dumps(kept), encoding="utf-8")
