"""The tokens that end an answer."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Ids of every end-of-sequence token of config, generation config and tokenizer; empty if there is none.

    Instruction-tuned models often name their end of turn in only one of the three.
    """
    ids: set[int] = set()
    for owner in (model.config, model.generation_config, tokenizer):
        named = getattr(owner, "eos_token_id", None)
        ids.update([named] if isinstance(named, int) else named or [])
    return frozenset(ids)
