"""The tokens that end an answer."""

import contextlib
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.target.directory import resolve_model_dir
from eagle_rpc.target.model_files import load_target_config


def stop_token_ids(*owners: Any) -> frozenset[int]:
    """Ids of every end-of-sequence token of the owners: configs, generation config, tokenizer.

    Instruction-tuned models often name their end of turn in only one of them. Empty if none has one.
    """
    ids: set[int] = set()
    for owner in owners:
        named = getattr(owner, "eos_token_id", None)
        ids.update([named] if isinstance(named, int) else named or [])
    return frozenset(ids)


def stored_stop_token_ids(
    config: TargetConfig, tokenizer: PreTrainedTokenizerBase, *, cache_dir: str | Path
) -> frozenset[int]:
    """`stop_token_ids` of a target whose weights are not loaded."""
    stored = load_target_config(config, cache_dir=cache_dir)
    owners: list[Any] = [stored, stored.get_text_config(), tokenizer]
    # A model need not have a generation config.
    with contextlib.suppress(OSError):
        owners.append(GenerationConfig.from_pretrained(resolve_model_dir(config, cache_dir)))
    return stop_token_ids(*owners)
