"""An engine's decoding beside ours: the same texts, and drafts and accepted guesses of every prompt.

Texts are equal with any draft, and captured layers that are off by one cost little accept length; counts show it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

import eagle_rpc
from eagle_rpc.evaluate.greedy import GreedyTarget
from eagle_rpc.evaluate.guesses import fitted_draft
from eagle_rpc.evaluate.proposer import DraftProposer
from eagle_rpc.evaluate.speculative import decode_speculatively
from eagle_rpc.serving import ExportedDraft
from eagle_rpc.serving.engine_side import DecodingOutcome, DecodingWork


def decode_here(model: PreTrainedModel, export: ExportedDraft, work: DecodingWork) -> DecodingOutcome:
    """The work of an engine by the loop of `job=evaluate`. Raises as `fitted_draft` and `decode_speculatively`."""
    target = GreedyTarget(model, export.aux_layer_ids)
    proposer = DraftProposer(fitted_draft(model, export), export.mapping, work.num_draft_tokens)
    decoded = [
        decode_speculatively(
            target,
            proposer,
            prompt_ids,
            max_new_tokens=work.max_new_tokens,
            stop_token_ids=work.stop_token_ids,
        )
        for prompt_ids in work.prompts
    ]
    return DecodingOutcome(
        eagle_rpc.__version__,
        [one.token_ids for one in decoded],
        [one.counts.num_drafts for one in decoded],
        [one.counts.accepted_per_position for one in decoded],
    )


@dataclass(frozen=True, kw_only=True)
class ServedDraft:
    """An engine beside this package. A prompt is named by its index."""

    engine: str
    ours: DecodingOutcome
    theirs: DecodingOutcome
    control: DecodingOutcome | None  # the engine with shifted layers

    @property
    def differing_texts(self) -> list[int]:
        return _differing(self.ours.texts, self.theirs.texts)

    @property
    def differing_counts(self) -> list[int]:
        return _differing(_counts(self.ours), _counts(self.theirs))

    @property
    def control_shows(self) -> bool | None:
        """Whether the shift changes the counts of a prompt; null without a control."""
        return None if self.control is None else _counts(self.control) != _counts(self.theirs)

    @property
    def is_ours(self) -> bool:
        """Whether texts and counts are equal, and a control, if there is one, shows."""
        return not self.differing_texts and not self.differing_counts and self.control_shows is not False

    def to_json(self) -> dict[str, Any]:
        """The outcomes and the verdicts."""
        verdicts = ("differing_texts", "differing_counts", "control_shows", "is_ours")
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
        if self.control is not None:
            seen = "shows in the counts" if self.control_shows else "DOES NOT SHOW in the counts"
            lines.append(f"  shift  {seen}: {'they tell' if self.control_shows else 'ask more prompts'}")
        return "\n".join(lines) + "\n"


def _counts(outcome: DecodingOutcome) -> list[tuple[int, list[int]]]:
    return list(zip(outcome.num_drafts, outcome.accepted_per_position, strict=True))


def _differing(mine: Sequence[Any], theirs: Sequence[Any]) -> list[int]:
    return [index for index, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other]


def _verdict(differing: list[int], same: str) -> str:
    return (
        f"DIFFER in {len(differing)} prompts, the first is number {differing[0] + 1}" if differing else same
    )
