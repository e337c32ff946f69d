"""What a draft gives in real decoding: accept length, speed, and whether the text stays the target's own."""

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eagle_rpc.errors import ConfigError, TargetMismatch
from eagle_rpc.evaluate.greedy import GreedyTarget
from eagle_rpc.evaluate.proposer import DraftProposer
from eagle_rpc.evaluate.speculative import (
    DecodingCounts,
    check_fits,
    decode_greedily,
    decode_speculatively,
)
from eagle_rpc.process.files import replaced_file
from eagle_rpc.report.progress import Progress
from eagle_rpc.serving import ExportedDraft
from eagle_rpc.target.stop_tokens import stop_token_ids

# Tokens decoded before times are taken: first calls allocate memory and choose kernels.
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptResult:
    """One prompt, decoded both ways."""

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    own_tokens: int  # of the text that the target decodes alone
    num_drafts: int
    accepted_per_position: list[int]
    accept_length: float
    identical: bool  # to the text that the target decodes alone
    difference: int | None  # index of the first token that differs
    margin: float | None  # distance between the target's two best logits there
    seconds: float
    seconds_without_draft: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The content of `evaluation.json`. Shares are of all drafts unless they are named conditional."""

    accept_length: float  # tokens per verifying target call, the target's own token included
    acceptance_per_position: list[float]
    conditional_acceptance_per_position: list[float]  # among drafts whose earlier guesses were all accepted
    num_drafts: int
    num_drafted: int
    accepted_per_position: list[int]
    identical_texts: bool  # all texts equal the target's own, except for near-ties
    differing_texts: int  # without near-ties
    near_ties: int  # texts that first differ where the target's two best logits are closer than `near_tie`
    num_prompts: int
    num_tokens: int
    tokens_per_second: float
    tokens_per_second_without_draft: float
    settings: dict[str, Any]
    prompts: list[PromptResult]

    def write(self, path: Path) -> None:
        """Writes JSON, in one piece."""
        with replaced_file(path) as fresh:
            fresh.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def summary(self) -> str:
        """Four lines for a terminal."""
        shares = "  ".join(f"{share:.3f}" for share in self.acceptance_per_position)
        same = "identical to the target's own"
        if not self.identical_texts:
            same = f"DIFFERENT in {self.differing_texts} texts"
        drafts = f"{self.num_drafts} drafts, {self.num_prompts} prompts"
        without = f"{self.tokens_per_second_without_draft:.1f} without"
        return (
            f"accept length        {self.accept_length:.3f} tokens a target call ({drafts})\n"
            f"accepted by position {shares}\n"
            f"text                 {same} ({self.near_ties} near-ties)\n"
            f"tokens per second    {self.tokens_per_second:.1f} with the draft, {without}\n"
        )


def draft_proposer(model: PreTrainedModel, export: ExportedDraft, *, num_draft_tokens: int) -> DraftProposer:
    """The draft in the target's dtype, on its device. Raises `TargetMismatch` for another target's draft."""
    target_shape = list(model.get_input_embeddings().get_parameter("weight").shape)
    draft_shape = [export.config.vocab_size, export.config.hidden_size]
    if draft_shape != target_shape:
        raise TargetMismatch(
            f"the draft must be of a target with embedding [V, H] {target_shape}, got {draft_shape}"
        )
    return DraftProposer(
        export.model().to(model.device, model.dtype).eval(), export.mapping, num_draft_tokens
    )


def evaluate_draft(
    model: PreTrainedModel,
    export: ExportedDraft,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_draft_tokens: int,
    near_tie: float,
    stop_ids: Collection[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Evaluation:
    """Decodes every prompt (token ids) by the target alone and with the draft.

    Null `stop_ids`: those of model and tokenizer. With a tokenizer the result has prompts and texts in words.
    Before anything is decoded, raises `ConfigError` if there is no prompt or one does not fit the target's
    context, `TargetMismatch` if the draft does not fit the target.
    """
    if not prompts:
        raise ConfigError("evaluate.prompts must hold at least one prompt, got none")
    target = GreedyTarget(model, export.aux_layer_ids)
    proposer = draft_proposer(model, export, num_draft_tokens=num_draft_tokens)
    for prompt_ids in prompts:
        check_fits(target, prompt_ids, max_new_tokens + num_draft_tokens)
    stop = stop_token_ids(model.config, model.generation_config, tokenizer) if stop_ids is None else stop_ids
    _decode_both(target, proposer, prompts[0], min(_WARM_UP_TOKENS, max_new_tokens), stop, None)
    counts = DecodingCounts([0] * num_draft_tokens)
    results = []
    progress = Progress("prompt", len(prompts))
    for prompt_ids in prompts:
        result, drafts = _decode_both(target, proposer, prompt_ids, max_new_tokens, stop, tokenizer)
        counts.add(drafts)
        results.append(result)
        progress.advance(lambda: f"accept length {counts.accept_length:.2f}")
    progress.close()
    settings = {
        "max_new_tokens": max_new_tokens,
        "num_draft_tokens": num_draft_tokens,
        "near_tie": near_tie,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "aux_layer_ids": list(target.aux_layer_ids),
    }
    return _evaluation(counts, results, near_tie, settings)


def _decode_both(
    target: GreedyTarget,
    proposer: DraftProposer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    stop: Collection[int],
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PromptResult, DecodingCounts]:
    """Decodes the prompt by the target alone, then with the draft."""
    started = time.perf_counter()
    own_ids, margins = decode_greedily(target, prompt_ids, max_new_tokens=max_new_tokens, stop_token_ids=stop)
    between = time.perf_counter()
    token_ids, counts = decode_speculatively(
        target, proposer, prompt_ids, max_new_tokens=max_new_tokens, stop_token_ids=stop
    )
    finished = time.perf_counter()
    # Neither text is a beginning of the other: both end at the same limit or at a stop token.
    pairs = enumerate(zip(own_ids, token_ids, strict=False))
    difference = next((index for index, (mine, theirs) in pairs if mine != theirs), None)
    result = PromptResult(
        prompt="" if tokenizer is None else str(tokenizer.decode(list(prompt_ids))),
        text="" if tokenizer is None else str(tokenizer.decode(token_ids)),
        prompt_tokens=len(prompt_ids),
        tokens=counts.num_tokens,
        own_tokens=len(own_ids),
        num_drafts=counts.num_drafts,
        accepted_per_position=counts.accepted_per_position,
        accept_length=counts.accept_length,
        identical=difference is None,
        difference=difference,
        margin=None if difference is None else margins[difference],
        seconds=finished - between,
        seconds_without_draft=between - started,
    )
    return result, counts


def _evaluation(
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
