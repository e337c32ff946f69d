"""An engine's decoding beside ours: the same texts, and drafts and accepted guesses of every prompt.

Texts are equal with any draft, and captured layers that are off by one cost little accept length; counts show it.
Where the two best logits are nearer than rounding, either choice is right: such a prompt is a near tie, as in
`job=evaluate`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

import eagle_rpc
from eagle_rpc.evaluate.decoding.greedy import GreedyTarget
from eagle_rpc.evaluate.decoding.judge import first_difference
from eagle_rpc.evaluate.decoding.proposer import DraftProposer
from eagle_rpc.evaluate.decoding.speculative import Decoding, decode_speculatively
from eagle_rpc.evaluate.guesses import fitted_draft
from eagle_rpc.report.progress import Progress
from eagle_rpc.serving import ExportedDraft
from eagle_rpc.serving.engine_side import DecodingOutcome, DecodingWork

Kind = Literal["text", "counts", "near tie"]


@dataclass(frozen=True)
class OwnOutcome(DecodingOutcome):
    """What this package decoded, and how clear each choice was."""

    text_margins: list[list[float]]  # between the target's two best logits at each token of each text
    guess_margins: list[float | None]  # of each prompt: the smallest, of target or draft, at a judged guess


def decode_here(model: PreTrainedModel, export: ExportedDraft, work: DecodingWork) -> OwnOutcome:
    """The work of an engine by the loop of `job=evaluate`. Raises as `fitted_draft` and `decode_speculatively`."""
    target = GreedyTarget(model, export.aux_layer_ids)
    proposer = DraftProposer(fitted_draft(model, export), export.mapping, work.num_draft_tokens)
    decoded, progress = list[Decoding](), Progress("prompt", len(work.prompts), title="decoding here")
    for prompt_ids in work.prompts:
        decoding = decode_speculatively(
            target,
            proposer,
            prompt_ids,
            max_new_tokens=work.max_new_tokens,
            stop_token_ids=work.stop_token_ids,
        )
        decoded.append(decoding)
        progress.advance()
    progress.close()
    return OwnOutcome(
        eagle_rpc.__version__,
        [one.token_ids for one in decoded],
        [one.counts.num_drafts for one in decoded],
        [one.counts.accepted_per_position for one in decoded],
        [_text_margins(one) for one in decoded],
        [_guess_margin(one) for one in decoded],
    )


def _text_margins(decoding: Decoding) -> list[float]:
    rounds = zip(decoding.accepted, decoding.margins, strict=True)
    chosen = [margin for accepted, margins in rounds for margin in margins[: accepted + 1]]
    return [decoding.first_margin, *chosen][: len(decoding.token_ids)]


def _guess_margin(decoding: Decoding) -> float | None:
    """Null without a guess. Of each draft, the guesses up to the first wrong one decide the counts."""
    rounds = zip(decoding.accepted, decoding.margins, decoding.guess_margins, strict=True)
    pairs = (
        pair
        for accepted, of_target, of_draft in rounds
        for pair in list(zip(of_target, of_draft, strict=False))[: accepted + 1]
    )
    return min((min(pair) for pair in pairs), default=None)


@dataclass(frozen=True, kw_only=True)
class ServedDraft:
    """An engine beside this package. A prompt is named by its index."""

    engine: str
    ours: OwnOutcome
    theirs: DecodingOutcome
    control: DecodingOutcome | None  # the engine with shifted layers
    near_tie: float  # two outcomes may differ where two logits are closer than this

    @property
    def differing_texts(self) -> list[int]:
        """Without near ties, as `differing_counts`, which are those of equal texts."""
        return _of_kind("text", self._differences(self.theirs))

    @property
    def differing_counts(self) -> list[int]:
        return _of_kind("counts", self._differences(self.theirs))

    @property
    def near_ties(self) -> list[int]:
        """Prompts that differ, and by nothing but a near tie."""
        return _of_kind("near tie", self._differences(self.theirs))

    @property
    def control_shows(self) -> bool | None:
        """Whether the shift would have been noticed: a prompt differs, near ties aside. Null without a control."""
        if self.control is None:
            return None
        return any(kind != "near tie" for kind in self._differences(self.control).values())

    @property
    def is_ours(self) -> bool:
        """Whether texts and counts are equal, near ties aside, and a control, if there is one, shows."""
        return not self.differing_texts and not self.differing_counts and self.control_shows is not False

    def _differences(self, other: DecodingOutcome) -> dict[int, Kind]:
        """How each prompt differs that does."""
        found: dict[int, Kind] = {}
        for index, (text, text_there) in enumerate(zip(self.ours.texts, other.texts, strict=True)):
            if text != text_there:
                kind: Kind = "text"
                place = first_difference(text, text_there)
                margin = None if place is None else self.ours.text_margins[index][place]
            elif _counts(self.ours, index) != _counts(other, index):
                kind, margin = "counts", self.ours.guess_margins[index]
            else:
                continue
            found[index] = "near tie" if margin is not None and margin < self.near_tie else kind
        return found

    def to_json(self) -> dict[str, Any]:
        """The outcomes and the verdicts."""
        verdicts = ("differing_texts", "differing_counts", "near_ties", "control_shows", "is_ours")
        return asdict(self) | {name: getattr(self, name) for name in verdicts}

    def summary(self) -> str:
        """Lines for a terminal."""
        num_prompts, num_tokens = len(self.ours.texts), sum(map(len, self.ours.texts))
        lines = [f"{self.engine} {self.theirs.version}: {num_prompts} prompts, {num_tokens} tokens"]
        outcomes = {"eagle_rpc": self.ours, self.engine: self.theirs, "layers shifted": self.control}
        for name, outcome in outcomes.items():
            if outcome is not None:
                drafts, accepted = outcome.counts
                counted = f"drafts {drafts:5}  accepted by position {accepted}"
                lines.append(f"  {name:15} {counted}  accept length {outcome.accept_length:.4f}")
        lines.append(f"  texts  {_verdict(self.differing_texts, 'identical')}")
        lines.append(f"  counts {_verdict(self.differing_counts, 'agree')}")
        if self.near_ties:
            numbers = ", ".join(str(index + 1) for index in self.near_ties)
            lines.append(
                f"  near ties: prompts {numbers} differ where two logits are within {self.near_tie:g}"
            )
        if self.control is not None:
            seen = "shows in the counts" if self.control_shows else "DOES NOT SHOW in the counts"
            lines.append(f"  shift  {seen}: {'they tell' if self.control_shows else 'ask more prompts'}")
        return "\n".join(lines) + "\n"


def _counts(outcome: DecodingOutcome, index: int) -> tuple[int, list[int]]:
    return outcome.num_drafts[index], outcome.accepted_per_position[index]


def _of_kind(kind: Kind, differences: Mapping[int, Kind]) -> list[int]:
    return [index for index, found in differences.items() if found == kind]


def _verdict(differing: list[int], same: str) -> str:
    return (
        f"DIFFER in {len(differing)} prompts, the first is number {differing[0] + 1}" if differing else same
    )
