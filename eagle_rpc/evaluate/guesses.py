"""What a draft guesses over the target's own texts, which all drafts of a comparison share."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from eagle_rpc.config.choices import Guesses
from eagle_rpc.config.schema import EvaluateConfig
from eagle_rpc.draft import (
    Chains,
    DrawnGuesses,
    Eagle3Draft,
    TargetText,
    TextTrees,
    TreeShape,
    guess_chains,
    guess_trees,
)
from eagle_rpc.errors import ConfigError, TargetMismatch
from eagle_rpc.evaluate.decoding.speculative import check_fits
from eagle_rpc.evaluate.own_text import captured_states, log_probs, own_texts
from eagle_rpc.report.progress import Progress
from eagle_rpc.report.versions import versions
from eagle_rpc.serving import ExportedDraft
from eagle_rpc.sizes.target import aux_layers
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.capture import find_decoder_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Guessed:
    """What a draft guesses over one text."""

    text: TargetText
    chains: Chains  # of `longest_round` guesses
    trees: TextTrees | None  # with `evaluate.tree_nodes`


def fitted_draft(model: PreTrainedModel, export: ExportedDraft) -> Eagle3Draft:
    """The draft in the target's dtype, on its device. Raises `TargetMismatch` for another target's draft."""
    target_shape = list(model.get_input_embeddings().get_parameter("weight").shape)
    draft_shape = [export.config.vocab_size, export.config.hidden_size]
    if draft_shape != target_shape:
        raise TargetMismatch(
            f"the draft must be of a target with embedding [V, H] {target_shape}, got {draft_shape}"
        )
    return export.model().to(model.device, model.dtype).eval()


def answered(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: EvaluateConfig,
    stop_token_ids: Collection[int],
) -> list[TargetText]:
    """The target's own text of each prompt.

    Raises `ConfigError` if there is no prompt, or if one does not fit the target's context with the tokens to
    decode.
    """
    if not prompts:
        raise ConfigError("evaluate.prompts must hold at least one prompt, got none")
    context = TargetShape.of(model.config).context or sys.maxsize
    for prompt_ids in prompts:
        check_fits(context, prompt_ids, settings.max_new_tokens + longest_round(settings))
    return own_texts(
        model,
        prompts,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        stop_token_ids=stop_token_ids,
        # The last draft begins before the last token of the text.
        tokens_after_end=longest_round(settings) - 1,
        temperature=settings.temperature,
    )


def guesses_of(
    model: PreTrainedModel,
    draft: Eagle3Draft,
    export: ExportedDraft,
    texts: Sequence[TargetText],
    settings: EvaluateConfig,
) -> list[Guessed]:
    """The chains and trees that `draft`, the fitted draft of `export`, guesses over each text."""
    layers = aux_layers(len(find_decoder_layers(model)), export.aux_layer_ids)
    shape, longest = tree_shape(settings), longest_round(settings)
    guessed, progress = dict[int, Guessed](), Progress("prompt", len(texts), title="guessing")
    for index, aux_TW in captured_states(model, layers, texts):
        text, drawn = texts[index], _drawn(model, texts[index], settings, seed=index)
        guessed[index] = Guessed(
            text=text,
            chains=guess_chains(draft, export.mapping, text, aux_TW, longest, drawn),
            trees=None if shape is None else guess_trees(draft, export.mapping, text, aux_TW, shape),
        )
        progress.advance()
    progress.close()
    return [guessed[index] for index in range(len(texts))]


def tree_shape(settings: EvaluateConfig) -> TreeShape | None:
    """The trees of these settings; null without `evaluate.tree_nodes`."""
    if settings.tree_nodes is None:
        return None
    return TreeShape(depth=settings.tree_depth, branching=settings.tree_branching, nodes=settings.tree_nodes)


def longest_round(settings: EvaluateConfig) -> int:
    """The most guesses that a round may accept. Chains are as long as trees are deep, to be compared with them."""
    shape = tree_shape(settings)
    return max(settings.num_draft_tokens, 0 if shape is None else shape.depth)


def _drawn(
    model: PreTrainedModel, text: TargetText, settings: EvaluateConfig, *, seed: int
) -> DrawnGuesses | None:
    if settings.guesses is Guesses.likeliest:
        return None
    return DrawnGuesses(
        temperature=settings.temperature,
        log_probs_T=log_probs(model, text, settings.temperature),
        generator=torch.Generator().manual_seed(seed),
    )


def conditions(model: PreTrainedModel, settings: EvaluateConfig) -> dict[str, Any]:
    """All that figures depend on beside prompts and drafts, as JSON has it."""
    return {
        **asdict(settings),
        "guesses": settings.guesses.value,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
