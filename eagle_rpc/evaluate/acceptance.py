"""What a draft gives in decoding, from passes over the target's own texts; real decoding is the judge."""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eagle_rpc.config.schema import EvaluateConfig
from eagle_rpc.draft import Chains, DecodingCounts, Eagle3Draft, TargetText, replay
from eagle_rpc.evaluate.decoding.greedy import GreedyTarget
from eagle_rpc.evaluate.decoding.judge import GUESSES, DecodedPrompt, decode_both
from eagle_rpc.evaluate.decoding.proposer import DraftProposer
from eagle_rpc.evaluate.guesses import answered, conditions, fitted_draft, guesses_of
from eagle_rpc.evaluate.intervals import bootstrap_interval
from eagle_rpc.evaluate.pieces import pieces_of
from eagle_rpc.evaluate.result import Evaluation, PromptResult
from eagle_rpc.evaluate.slices import by_category, by_context, drafts_of
from eagle_rpc.evaluate.speed import BatchSpeed, estimate_speed
from eagle_rpc.evaluate.timing import time_calls
from eagle_rpc.evaluate.tree_figures import decode_with_judge, tree_figures
from eagle_rpc.report.progress import Progress
from eagle_rpc.serving import ExportedDraft
from eagle_rpc.target.stop_tokens import stop_token_ids

# Tokens decoded before times are taken: first calls allocate memory and choose kernels.
_WARM_UP_TOKENS = 4


def evaluate_draft(
    model: PreTrainedModel,
    export: ExportedDraft,
    prompts: Sequence[Sequence[int]],
    settings: EvaluateConfig,
    *,
    categories: Sequence[str] | None = None,
    stop_ids: Collection[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Evaluation:
    """Counts what decoding of the prompts (token ids) with the draft accepts.

    Of `settings`, those that name no file and no number of prompts to read count. `categories`: one for each
    prompt; null: all are of one. Null `stop_ids`: those of model and tokenizer. With a tokenizer the result
    has prompts and texts in words. Before anything is decoded, raises `ConfigError` if there is no prompt or
    one does not fit the target's context, `TargetMismatch` if the draft does not fit the target.
    """
    target, draft = GreedyTarget(model, export.aux_layer_ids), fitted_draft(model, export)
    stop = stop_token_ids(model.config, model.generation_config, tokenizer) if stop_ids is None else stop_ids
    texts = answered(model, prompts, settings, stop)
    guessed = guesses_of(model, draft, export, texts, settings)
    judged = [(one.text, one.chains) for one in guessed]
    proposer = DraftProposer(draft, export.mapping, settings.num_draft_tokens)
    decoded, tree_decoding = list[DecodedPrompt](), None
    if settings.temperature == 0:
        decoded = _decode(target, proposer, judged[: settings.num_decoded], settings.max_new_tokens, stop)
        if settings.tree_nodes is not None:
            first = guessed[: settings.num_decoded]
            tree_decoding = decode_with_judge(model, draft, export, first, settings, stop)
    names = categories or [""] * len(judged)
    result = _evaluation(judged, names, decoded, tokenizer, settings, coverage=_coverage(export, texts))
    result = replace(
        result,
        tree=tree_figures(guessed, names, settings),
        tree_decoding=tree_decoding,
        speed=_speed(model, draft, texts, result.accept_length_by_draft_tokens, settings),
    )
    result.settings.update(conditions(model, settings), aux_layer_ids=list(target.aux_layer_ids))
    return result


def _decode(
    target: GreedyTarget,
    proposer: DraftProposer,
    judged: Sequence[tuple[TargetText, Chains]],
    max_new_tokens: int,
    stop: Collection[int],
) -> list[DecodedPrompt]:
    """Real decoding of the prompts, one by one."""
    warm_up = min(_WARM_UP_TOKENS, max_new_tokens)
    decode_both(target, proposer, *judged[0], max_new_tokens=warm_up, stop_token_ids=stop)
    decoded, progress = list[DecodedPrompt](), Progress("prompt", len(judged), title="decoding")
    for text, chains in judged:
        decoded.append(
            decode_both(target, proposer, text, chains, max_new_tokens=max_new_tokens, stop_token_ids=stop)
        )
        progress.advance()
    progress.close()
    return decoded


def _speed(
    model: PreTrainedModel,
    draft: Eagle3Draft,
    texts: Sequence[TargetText],
    accept_lengths: Mapping[int, float],
    settings: EvaluateConfig,
) -> list[BatchSpeed]:
    """The speed at each of `evaluate.batch_sizes`, in the middle of an answer."""
    if not settings.batch_sizes:
        return []
    context = sum(len(text.prompt_ids) + len(text.token_ids) // 2 for text in texts) // len(texts)
    speeds, progress = list[BatchSpeed](), Progress("batch size", len(settings.batch_sizes), title="timing")
    for batch_size in settings.batch_sizes:
        k = settings.num_draft_tokens
        times = time_calls(model, draft, batch_size=batch_size, context=context, num_draft_tokens=k)
        speeds.append(estimate_speed(times, accept_lengths))
        progress.advance()
    progress.close()
    return speeds


def _evaluation(
    judged: Sequence[tuple[TargetText, Chains]],
    categories: Sequence[str],
    decoded: Sequence[DecodedPrompt],
    tokenizer: PreTrainedTokenizerBase | None,
    settings: EvaluateConfig,
    *,
    coverage: float,
) -> Evaluation:
    longest = settings.num_draft_tokens
    by_length = {k: _counts(judged, k) for k in range(1, longest + 1)}
    by_prompt = [_counts([one], longest) for one in judged]
    drafts_by_prompt = [drafts_of(*one, longest) for one in judged]
    counts, drafts = by_length[longest], [one.num_drafts for one in by_prompt]
    clearest = [max(one.differences, key=lambda each: each.margin) for one in decoded if one.differences]
    unexplained = [one for one in clearest if one.margin >= settings.near_tie]
    differing_counts = sum(one.of == GUESSES for one in unexplained)
    differing_texts = len(unexplained) - differing_counts
    return Evaluation(
        accept_length=counts.accept_length,
        accept_length_interval=bootstrap_interval(
            [one.num_drafts + sum(one.accepted_per_position) for one in by_prompt], drafts
        ),
        accept_length_within_text=counts.accept_length_within_text,
        accept_length_within_text_interval=bootstrap_interval(
            [one.num_tokens - one.num_texts for one in by_prompt], drafts
        ),
        accept_length_by_draft_tokens={k: one.accept_length for k, one in by_length.items()},
        by_category=by_category(drafts_by_prompt, categories),
        by_context=by_context(drafts_by_prompt),
        acceptance_per_position=counts.acceptance_per_position,
        acceptance_per_position_intervals=[
            bootstrap_interval([one.accepted_per_position[position] for one in by_prompt], drafts)
            for position in range(longest)
        ],
        conditional_acceptance_per_position=counts.conditional_acceptance_per_position,
        num_drafts=counts.num_drafts,
        num_drafted=counts.num_drafted,
        accepted_per_position=counts.accepted_per_position,
        num_prompts=counts.num_texts,
        num_tokens=counts.num_tokens,
        coverage=coverage,
        num_decoded=len(decoded),
        counts_agree=not differing_counts if decoded else None,
        identical_texts=not differing_texts if decoded else None,
        differing_counts=differing_counts,
        differing_texts=differing_texts,
        near_ties=len(clearest) - len(unexplained),
        tokens_per_second=_rate((one.tokens, one.seconds) for one in decoded),
        tokens_per_second_without_draft=_rate((one.own_tokens, one.seconds_without_draft) for one in decoded),
        settings={},
        prompts=[
            _prompt_result(text, chains, category, of_prompt, real, tokenizer, longest)
            for (text, chains), category, of_prompt, real in itertools.zip_longest(
                judged, categories, by_prompt, decoded
            )
        ],
    )


def _coverage(export: ExportedDraft, texts: Sequence[TargetText]) -> float:
    known = set(export.mapping.selected_token_ids.tolist())
    said = [token_id for text in texts for token_id in text.token_ids]
    return sum(token_id in known for token_id in said) / max(1, len(said))


def _rate(measured: Iterable[tuple[int, float]]) -> float | None:
    """Tokens a second."""
    tokens, seconds = (sum(column) for column in zip((0, 0.0), *measured, strict=True))
    return tokens / seconds if seconds else None


def _counts(judged: Sequence[tuple[TargetText, Chains]], num_draft_tokens: int) -> DecodingCounts:
    counts = DecodingCounts([0] * num_draft_tokens)
    for text, chains in judged:
        accepted = replay(chains.num_right, num_draft_tokens)
        counts.add(DecodingCounts.of_text(accepted, num_draft_tokens, len(text.token_ids)))
    return counts


def _prompt_result(
    text: TargetText,
    chains: Chains,
    category: str,
    counts: DecodingCounts,
    decoded: DecodedPrompt | None,
    tokenizer: PreTrainedTokenizerBase | None,
    num_draft_tokens: int,
) -> PromptResult:
    return PromptResult(
        category=category,
        prompt="" if tokenizer is None else str(tokenizer.decode(list(text.prompt_ids))),
        text="" if tokenizer is None else str(tokenizer.decode(list(text.token_ids))),
        prompt_tokens=len(text.prompt_ids),
        tokens=counts.num_tokens,
        num_drafts=counts.num_drafts,
        accepted_per_position=counts.accepted_per_position,
        accept_length=counts.accept_length,
        pieces=[] if tokenizer is None else pieces_of(text, chains, tokenizer, num_draft_tokens),
        decoded=decoded,
    )
