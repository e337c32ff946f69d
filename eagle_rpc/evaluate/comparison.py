"""Several drafts over the same texts of their target, so that differences between drafts are not of texts."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eagle_rpc.config.schema import EvaluateConfig
from eagle_rpc.draft import Eagle3Draft
from eagle_rpc.evaluate.guesses import answered, conditions, fitted_draft, guesses_of
from eagle_rpc.evaluate.intervals import Interval, bootstrap_gain
from eagle_rpc.evaluate.result import with_interval
from eagle_rpc.evaluate.slices import (
    Draft,
    DraftSlice,
    by_category,
    by_context,
    drafts_of,
    slice_of,
    tokens_and_calls,
)
from eagle_rpc.evaluate.tree_figures import TreeFigures, tree_figures
from eagle_rpc.process.files import replaced_file
from eagle_rpc.serving import ExportedDraft


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedDraft:
    """The figures of one draft, with `num_draft_tokens` guesses unless they say otherwise."""

    directory: str
    parameters: int  # without the embedding, which is the target's
    overall: DraftSlice
    gain: float  # accept length less that of the first draft
    gain_interval: Interval  # the same prompts drawn for both; it excludes 0 where the drafts differ
    accept_length_by_draft_tokens: dict[int, float]
    acceptance_per_position: list[float]
    by_category: dict[str, DraftSlice]
    by_context: dict[int, DraftSlice]
    tree: TreeFigures | None = None  # with `evaluate.tree_nodes`


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The content of `comparison.json`."""

    drafts: list[ComparedDraft]
    num_prompts: int
    num_tokens: int
    settings: dict[str, Any]

    def write(self, path: Path) -> None:
        """Writes JSON, in one piece."""
        with replaced_file(path) as fresh:
            fresh.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def rows(self) -> list[tuple[str, list[str]]]:
        """A title and a cell for each draft, for tables."""
        longest = len(self.drafts[0].acceptance_per_position)
        rows = [
            ("accept length", [_cell(one.overall) for one in self.drafts]),
            ("gain over the first", [_gain_cell(one, self.drafts[0]) for one in self.drafts]),
        ]
        for k in range(1, longest + 1):
            lengths = [one.accept_length_by_draft_tokens[k] for one in self.drafts]
            rows.append((f"with {k} draft tokens", [f"{length:.3f}" for length in lengths]))
        for position in range(longest):
            shares = [one.acceptance_per_position[position] for one in self.drafts]
            rows.append(
                (f"accepted at position {position + 1}", [f"{100 * share:.1f} %" for share in shares])
            )
        for title, of_draft in (
            ("category", [one.by_category for one in self.drafts]),
            ("context up to", [one.by_context for one in self.drafts]),
        ):
            rows += _slice_rows(title, of_draft)
        return rows + _tree_rows([one.tree for one in self.drafts if one.tree is not None])


def _tree_rows(trees: Sequence[TreeFigures]) -> list[tuple[str, list[str]]]:
    """Of all drafts, or of none."""
    if not trees:
        return []
    depth, branching, nodes = trees[0].depth, trees[0].branching, max(one.nodes_per_call for one in trees)
    lengths = [with_interval(one.accept_length, one.accept_length_interval) for one in trees]
    gains = [with_interval(one.gain, one.gain_interval) for one in trees]
    title = f"tree of {nodes} guesses, depth {depth}, branching {branching}"
    return [(title, lengths), (f"tree over chains of {depth}", gains)]


def _slice_rows(title: str, of_draft: Sequence[Mapping[Any, DraftSlice]]) -> list[tuple[str, list[str]]]:
    """Nothing for a single slice, which is all there is. The last contexts have no draft of some chains."""
    names = list(dict.fromkeys(name for slices in of_draft for name in slices))
    if len(names) < 2:
        return []
    return [
        (f"{title} {name}", [_cell(slices[name]) if name in slices else "" for slices in of_draft])
        for name in names
    ]


def _cell(one: DraftSlice) -> str:
    return with_interval(one.accept_length, one.accept_length_interval)


def _gain_cell(one: ComparedDraft, first: ComparedDraft) -> str:
    return "" if one is first else with_interval(one.gain, one.gain_interval)


def compare_drafts(
    model: PreTrainedModel,
    drafts: Mapping[str, ExportedDraft],
    prompts: Sequence[Sequence[int]],
    settings: EvaluateConfig,
    *,
    categories: Sequence[str],
    stop_token_ids: Collection[int],
) -> Comparison:
    """Counts what decoding of the prompts (token ids) accepts with each draft, by its directory's name.

    Nothing is decoded for real: the target answers once, and each draft guesses over its texts. Raises as
    `evaluate_draft`.
    """
    fitted = {name: fitted_draft(model, export) for name, export in drafts.items()}
    texts, longest = answered(model, prompts, settings, stop_token_ids), settings.num_draft_tokens
    compared, first = list[ComparedDraft](), list[list[Draft]]()
    for name, draft in fitted.items():
        guessed = guesses_of(model, draft, drafts[name], texts, settings)
        by_length = {
            k: [drafts_of(one.text, one.chains, k) for one in guessed] for k in range(1, longest + 1)
        }
        first = first or by_length[longest]
        trees = tree_figures(guessed, categories, settings)
        compared.append(replace(_compared(name, draft, by_length, first, categories), tree=trees))
    return Comparison(
        drafts=compared,
        num_prompts=len(texts),
        num_tokens=sum(len(text.token_ids) for text in texts),
        settings=conditions(model, settings),
    )


def _compared(
    directory: str,
    draft: Eagle3Draft,
    by_length: Mapping[int, list[list[Draft]]],
    first: list[list[Draft]],
    categories: Sequence[str],
) -> ComparedDraft:
    longest = max(by_length)
    mine, overall = by_length[longest], slice_of(by_length[longest])
    return ComparedDraft(
        directory=directory,
        parameters=sum(one.numel() for one in draft.parameters() if one.requires_grad),
        overall=overall,
        gain=overall.accept_length - slice_of(first).accept_length,
        gain_interval=bootstrap_gain(*(tokens_and_calls(drafts) for drafts in (first, mine))),
        accept_length_by_draft_tokens={k: slice_of(drafts).accept_length for k, drafts in by_length.items()},
        acceptance_per_position=[
            sum(draft.accepted > position for of_prompt in mine for draft in of_prompt)
            / max(1, overall.num_drafts)
            for position in range(longest)
        ],
        by_category=by_category(mine, categories),
        by_context=by_context(mine),
    )
