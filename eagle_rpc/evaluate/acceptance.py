"""What a draft is worth: accept length, speed, and whether the text stays the target's own."""

import json
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from eagle_rpc.draft import Eagle3Draft
from eagle_rpc.errors import ConfigError, TargetMismatch
from eagle_rpc.evaluate.greedy import GreedyTarget
from eagle_rpc.evaluate.proposer import DraftProposer, Proposer
from eagle_rpc.evaluate.speculative import (
    DecodingCounts,
    GreedyText,
    check_fits,
    decode_greedily,
    decode_speculatively,
)
from eagle_rpc.serving.export import EMBEDDING, ExportedDraft

# Tokens decoded before the clock runs: first calls allocate and choose kernels.
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptResult:
    """One prompt, decoded both ways."""

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    own_tokens: int  # of the target's text
    num_drafts: int
    accepted_per_position: list[int]
    accept_length: float
    identical: bool  # the target's own text
    difference: int | None  # index of the first token that is not
    margin: float | None  # distance between the target's two best logits there
    seconds: float
    seconds_without_draft: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The content of `evaluation.json`. Shares are of all drafts unless they are named conditional."""

    accept_length: float  # tokens per verifying target call, its own included
    acceptance_per_position: list[float]
    conditional_acceptance_per_position: list[float]  # among drafts whose earlier guesses were all accepted
    num_drafts: int
    num_drafted: int
    accepted_per_position: list[int]
    identical_texts: bool  # every text is the target's own, near-ties aside
    differing_texts: int  # beyond near-ties
    near_ties: int  # texts that differ first where the target's two best logits are closer than `near_tie`
    num_prompts: int
    num_tokens: int
    tokens_per_second: float
    tokens_per_second_without_draft: float
    settings: dict[str, Any]
    prompts: list[PromptResult]

    def write(self, path: Path) -> None:
        """Writes JSON; a reader sees the whole file or the one before it."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)


def stop_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end a text of this model."""
    ids = (
        model.generation_config.eos_token_id
        if model.generation_config is not None
        else model.config.eos_token_id
    )
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def draft_proposer(model: PreTrainedModel, export: ExportedDraft, *, num_draft_tokens: int) -> DraftProposer:
    """The exported draft in the target's dtype and on its device. Raises `TargetMismatch` if it is another model's draft."""
    target_shape = tuple(model.get_input_embeddings().weight.shape)
    draft_shape = (export.config.vocab_size, export.config.hidden_size)
    if draft_shape != target_shape:
        raise TargetMismatch(
            f"the draft must be of a target with embedding [V, H] {list(target_shape)}, got {list(draft_shape)}"
        )
    draft = Eagle3Draft(export.config, export.weights[EMBEDDING])
    draft.load_state_dict(export.weights)
    return DraftProposer(draft.to(model.device, model.dtype).eval(), export.mapping, num_draft_tokens)


def evaluate_draft(
    model: PreTrainedModel,
    export: ExportedDraft,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_draft_tokens: int,
    near_tie: float,
    stop_ids: Collection[int],
    tokenizer: Any | None = None,
) -> Evaluation:
    """Decodes every prompt (token ids) by the target alone and with the draft.

    Texts and prompts are given in words where there is a `tokenizer`. Before anything is decoded, raises `ConfigError`
    if there is no prompt or one does not fit the target's context, `TargetMismatch` if the draft does not fit the target.
    """
    if not prompts:
        raise ConfigError("evaluate.prompts must hold at least one prompt, got none")
    target = GreedyTarget(model, export.aux_layer_ids)
    proposer = draft_proposer(model, export, num_draft_tokens=num_draft_tokens)
    for prompt_ids in prompts:
        check_fits(target, prompt_ids, max_new_tokens + num_draft_tokens)
    _decode_both(
        target, proposer, prompts[0], max_new_tokens=min(_WARM_UP_TOKENS, max_new_tokens), stop_ids=stop_ids
    )
    counts = DecodingCounts([0] * num_draft_tokens)
    results = []
    with tqdm(prompts, desc="evaluate", unit="prompt") as progress:
        for prompt_ids in progress:
            own, token_ids, drafts, seconds = _decode_both(
                target, proposer, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids
            )
            counts.add(drafts)
            results.append(_prompt_result(prompt_ids, own, token_ids, drafts, seconds, tokenizer))
            progress.set_postfix(accept_length=f"{counts.accept_length:.2f}")
    settings = {
        "max_new_tokens": max_new_tokens,
        "num_draft_tokens": num_draft_tokens,
        "near_tie": near_tie,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "aux_layer_ids": list(target.aux_layer_ids),
    }
    return _summary(counts, results, near_tie, settings)


def _decode_both(
    target: GreedyTarget,
    proposer: Proposer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> tuple[GreedyText, list[int], DecodingCounts, tuple[float, float]]:
    """The target's own text, the text and counts with the draft, and the seconds of each."""
    started = time.perf_counter()
    own = decode_greedily(target, prompt_ids, max_new_tokens=max_new_tokens, stop_token_ids=stop_ids)
    between = time.perf_counter()
    token_ids, counts = decode_speculatively(
        target, proposer, prompt_ids, max_new_tokens=max_new_tokens, stop_token_ids=stop_ids
    )
    return own, token_ids, counts, (between - started, time.perf_counter() - between)


def _prompt_result(
    prompt_ids: Sequence[int],
    own: GreedyText,
    token_ids: list[int],
    counts: DecodingCounts,
    seconds: tuple[float, float],
    tokenizer: Any | None,
) -> PromptResult:
    # Neither text is a proper beginning of the other: both end at the same limit or at a stop token.
    difference = next(
        (i for i, (mine, theirs) in enumerate(zip(own.token_ids, token_ids, strict=False)) if mine != theirs),
        None,
    )
    return PromptResult(
        prompt="" if tokenizer is None else tokenizer.decode(prompt_ids),
        text="" if tokenizer is None else tokenizer.decode(token_ids),
        prompt_tokens=len(prompt_ids),
        tokens=counts.num_tokens,
        own_tokens=len(own.token_ids),
        num_drafts=counts.num_drafts,
        accepted_per_position=counts.accepted_per_position,
        accept_length=counts.accept_length,
        identical=difference is None,
        difference=difference,
        margin=None if difference is None else own.margins[difference],
        seconds_without_draft=seconds[0],
        seconds=seconds[1],
    )


def _summary(
    counts: DecodingCounts, results: list[PromptResult], near_tie: float, settings: dict[str, Any]
) -> Evaluation:
    near_ties = sum(result.margin is not None and result.margin < near_tie for result in results)
    differing = sum(not result.identical for result in results) - near_ties
    own_tokens = sum(result.own_tokens for result in results)
    return Evaluation(
        accept_length=counts.accept_length,
        acceptance_per_position=counts.acceptance_per_position,
        conditional_acceptance_per_position=counts.conditional_acceptance_per_position,
        num_drafts=counts.num_drafts,
        num_drafted=counts.num_drafted,
        accepted_per_position=counts.accepted_per_position,
        identical_texts=differing == 0,
        differing_texts=differing,
        near_ties=near_ties,
        num_prompts=len(results),
        num_tokens=counts.num_tokens,
        tokens_per_second=counts.num_tokens / sum(result.seconds for result in results),
        tokens_per_second_without_draft=own_tokens / sum(result.seconds_without_draft for result in results),
        settings=settings,
        prompts=results,
    )
