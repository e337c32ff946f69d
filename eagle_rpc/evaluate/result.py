"""The figures of an evaluation, as `evaluation.json` has them and as a terminal shows them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eagle_rpc.evaluate.decoding.judge import DecodedPrompt
from eagle_rpc.evaluate.intervals import Interval
from eagle_rpc.evaluate.slices import DraftSlice
from eagle_rpc.evaluate.speed import BatchSpeed
from eagle_rpc.evaluate.tree_figures import TreeDecoding, TreeFigures
from eagle_rpc.process.files import replaced_file


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptResult:
    """One prompt."""

    category: str
    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    num_drafts: int
    accepted_per_position: list[int]
    accept_length: float
    pieces: list[tuple[str, int]]  # the text token by token; 0: the target's own, n: accepted as guess n
    decoded: DecodedPrompt | None  # of the first `evaluate.num_decoded` prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The content of `evaluation.json`. Shares are of all drafts unless they are named conditional.

    Counts follow from the target's own texts; real decoding of `num_decoded` prompts is their judge.
    """

    accept_length: float  # tokens a verifying target call as vLLM counts: also those beyond the end of a text
    accept_length_interval: Interval
    accept_length_within_text: float  # the same without tokens beyond the end of a text
    accept_length_within_text_interval: Interval
    accept_length_by_draft_tokens: dict[int, float]  # with drafts of 1 to `num_draft_tokens` guesses
    by_category: dict[str, DraftSlice]
    by_context: dict[
        int, DraftSlice
    ]  # by the most tokens known when a draft begins, each twice the one before
    acceptance_per_position: list[float]
    acceptance_per_position_intervals: list[Interval]
    conditional_acceptance_per_position: list[float]  # among drafts whose earlier guesses were all accepted
    num_drafts: int
    num_drafted: int
    accepted_per_position: list[int]
    num_prompts: int
    num_tokens: int
    coverage: float  # share of the tokens of the texts that the draft vocabulary has
    num_decoded: (
        int  # prompts that were also decoded for real, one by one; without any, the next two are null
    )
    counts_agree: bool | None  # drafts and accepted guesses of all of them are the same, except for near-ties
    identical_texts: bool | None  # all their texts equal the target's own, except for near-ties
    differing_counts: int  # prompts, without near-ties
    differing_texts: int
    near_ties: int  # prompts that first differ where the two best logits are closer than `near_tie`
    tokens_per_second: float | None  # in real decoding
    tokens_per_second_without_draft: float | None
    settings: dict[str, Any]
    prompts: list[PromptResult]
    tree: TreeFigures | None = None  # with `evaluate.tree_nodes`
    tree_decoding: TreeDecoding | None = None  # null also where the target does not take trees exactly
    speed: list[BatchSpeed] = field(default_factory=list)  # at each of `evaluate.batch_sizes`

    @property
    def is_confirmed(self) -> bool:
        """Whether real decoding gave the same texts and counts, near-ties aside, or there was none."""
        verdicts = [self.identical_texts, self.counts_agree]
        if self.tree_decoding is not None:
            verdicts += [self.tree_decoding.identical_texts, self.tree_decoding.counts_agree]
        return False not in verdicts

    def write(self, path: Path) -> None:
        """Writes JSON, in one piece."""
        with replaced_file(path) as fresh:
            fresh.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def card_figures(self) -> dict[str, str]:
        """What a model card shows."""
        settings, guesses = self.settings, len(self.acceptance_per_position)
        length = with_interval(self.accept_length, self.accept_length_interval)
        return {
            f"accept length with {guesses} draft tokens": f"{length} tokens a target call",
            "accepted by position": ", ".join(f"{share:.3f}" for share in self.acceptance_per_position),
            "over": f"{self.num_drafts} drafts, {self.num_prompts} prompts of {Path(settings['prompts']).name}",
            "decoding": f"temperature {settings['temperature']:g}, {settings['max_new_tokens']} new tokens, "
            f"{settings['dtype']}",
            "counts agree with real decoding": {True: "yes", False: "no", None: "not tried"}[
                self.counts_agree
            ],
        }

    def summary(self) -> str:
        """Lines for a terminal."""
        by_length = "  ".join(f"{k}: {value:.3f}" for k, value in self.accept_length_by_draft_tokens.items())
        shares = "  ".join(f"{share:.3f}" for share in self.acceptance_per_position)
        drafts = f"{self.num_drafts} drafts, {self.num_prompts} prompts"
        within = with_interval(self.accept_length_within_text, self.accept_length_within_text_interval)
        return (
            f"accept length        {with_interval(self.accept_length, self.accept_length_interval)} "
            f"tokens a target call ({drafts})\n"
            f"  within the text    {within} without tokens beyond its end\n"
            f"  by draft tokens    {by_length}\n"
            f"{_slices('by category', self.by_category)}{_slices('by context up to', self.by_context)}"
            f"accepted by position {shares}\n"
            f"{self._real_decoding()}{self._of_trees()}"
            f"{''.join(map(_speed_line, self.speed))}"
        )

    def _of_trees(self) -> str:
        tree = self.tree
        if tree is None:
            return ""
        shares = "  ".join(f"{share:.3f}" for share in tree.acceptance_per_depth)
        return (
            f"tree                 {with_interval(tree.accept_length, tree.accept_length_interval)} tokens a target "
            f"call of {tree.nodes_per_call} guesses ({tree.num_drafts} drafts)\n"
            f"  over the chain     {with_interval(tree.gain, tree.gain_interval)} more than with chains of "
            f"{tree.depth} ({tree.chain_accept_length:.3f})\n"
            f"{_slices('by category', tree.by_category)}"
            f"  accepted by depth  {shares}\n"
            f"{_tree_decoding(self.tree_decoding)}"
        )

    def _real_decoding(self) -> str:
        if not self.num_decoded:
            return "real decoding        none of texts that are drawn at a temperature\n"
        same, agree = _verdicts(self.differing_texts, self.differing_counts)
        return (
            f"text                 {same} ({self.num_decoded} prompts decoded, {self.near_ties} near-ties)\n"
            f"counts               {agree} with real decoding\n"
            f"tokens per second    {self.tokens_per_second:.1f} with the draft, "
            f"{self.tokens_per_second_without_draft:.1f} without\n"
        )


def _speed_line(speed: BatchSpeed) -> str:
    by_length = "  ".join(f"{k}: {ratio:.2f}" for k, ratio in speed.speed_up.items())
    best = speed.best_draft_tokens
    without = f"{speed.tokens_per_second_without_draft:.1f} tokens a second without a draft"
    advice = (
        f"best {best}: {speed.tokens_per_second[best]:.1f}, {without}" if best else f"none helps: {without}"
    )
    return (
        f"estimated speed-up   batch {speed.times.batch_size}, by draft tokens  {by_length}\n"
        f"                     {advice}\n"
    )


def _tree_decoding(decoding: TreeDecoding | None) -> str:
    if decoding is None:
        return "  real decoding      none\n"
    same, agree = _verdicts(decoding.differing_texts, decoding.differing_counts)
    num_decoded = len(decoding.prompts)
    return (
        f"  text               {same} ({num_decoded} prompts decoded, {decoding.near_ties} near-ties)\n"
        f"  counts             {agree} with real decoding\n"
        f"  tokens per second  {decoding.tokens_per_second:.1f} with trees\n"
    )


def _verdicts(differing_texts: int, differing_counts: int) -> tuple[str, str]:
    """About the texts of real decoding, and about its counts."""
    same = f"DIFFERENT in {differing_texts} texts" if differing_texts else "identical to the target's own"
    return same, f"DIFFER in {differing_counts} prompts" if differing_counts else "agree"


def _slices(title: str, slices: Mapping[Any, DraftSlice]) -> str:
    """A line for each slice; nothing for a single one, which is all there is."""
    if len(slices) < 2:
        return ""
    width = max(len(str(name)) for name in slices)
    return f"  {title}\n" + "".join(
        f"    {name!s:{width}} {with_interval(one.accept_length, one.accept_length_interval)} "
        f"({one.num_drafts} drafts, {one.num_prompts} prompts)\n"
        for name, one in slices.items()
    )


def with_interval(value: float, interval: Interval) -> str:
    return f"{value:.3f}" if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
