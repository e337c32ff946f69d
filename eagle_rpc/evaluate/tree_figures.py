"""What trees of guesses give, beside chains over the same texts."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from eagle_rpc.config.schema import EvaluateConfig
from eagle_rpc.draft import DecodingCounts, Eagle3Draft, replay
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.evaluate.decoding.judge import GUESSES, DecodedTrees, decode_trees
from eagle_rpc.evaluate.decoding.trees import TreeProposer, TreeTarget
from eagle_rpc.evaluate.guesses import Guessed, tree_shape
from eagle_rpc.evaluate.intervals import Interval, bootstrap_gain, bootstrap_interval
from eagle_rpc.evaluate.slices import DraftSlice, by_category, drafts_of, tokens_and_calls
from eagle_rpc.report.progress import Progress
from eagle_rpc.serving import ExportedDraft

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeFigures:
    """Counts of trees over the target's own texts. A draft is a tree, of which a call accepts one path."""

    depth: int
    branching: int
    nodes_per_call: int  # guesses that a target call verifies; a chain has as many as it is long
    accept_length: float
    accept_length_interval: Interval
    accept_length_within_text: float
    num_drafts: int
    accepted_per_depth: list[int]
    acceptance_per_depth: list[float]  # shares of all drafts
    by_category: dict[str, DraftSlice]
    chain_accept_length: float  # of chains of `depth` guesses
    gain: float  # accept length less that of these chains
    gain_interval: Interval  # the same prompts drawn for both


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeDecoding:
    """Real decoding of the first prompts with trees, the judge of counts and texts."""

    counts_agree: bool  # except for near-ties
    identical_texts: bool
    differing_counts: int  # prompts
    differing_texts: int
    near_ties: int
    tokens_per_second: float
    prompts: list[DecodedTrees]


def tree_figures(
    guessed: Sequence[Guessed], categories: Sequence[str], settings: EvaluateConfig
) -> TreeFigures | None:
    """The counts of all texts; null without `evaluate.tree_nodes`."""
    shape = tree_shape(settings)
    if shape is None:
        return None
    counts, num_nodes = DecodingCounts([0] * shape.depth), 0
    trees_of, chains_of = [], []
    for one in guessed:
        assert one.trees is not None
        accepted = replay(one.trees.num_right, shape.depth)
        counts.add(DecodingCounts.of_text(accepted, shape.depth, len(one.text.token_ids)))
        trees_of.append(drafts_of(one.text, one.trees, shape.depth))
        chains_of.append(drafts_of(one.text, one.chains, shape.depth))
        num_nodes = max(num_nodes, one.trees.num_nodes)
    trees, chains = tokens_and_calls(trees_of), tokens_and_calls(chains_of)
    chain_length = sum(chains[0]) / sum(chains[1]) if sum(chains[1]) else 1.0
    return TreeFigures(
        depth=shape.depth,
        branching=shape.branching,
        nodes_per_call=num_nodes,
        accept_length=counts.accept_length,
        accept_length_interval=bootstrap_interval(*trees),
        accept_length_within_text=counts.accept_length_within_text,
        num_drafts=counts.num_drafts,
        accepted_per_depth=counts.accepted_per_position,
        acceptance_per_depth=counts.acceptance_per_position,
        by_category=by_category(trees_of, categories),
        chain_accept_length=chain_length,
        gain=counts.accept_length - chain_length,
        gain_interval=bootstrap_gain(chains, trees),
    )


def decode_with_judge(
    model: PreTrainedModel,
    draft: Eagle3Draft,
    export: ExportedDraft,
    guessed: Sequence[Guessed],
    settings: EvaluateConfig,
    stop_token_ids: Collection[int],
) -> TreeDecoding | None:
    """Decodes these prompts with trees, one by one; null for a target that does not take trees exactly."""
    shape = tree_shape(settings)
    assert shape is not None
    try:
        target = TreeTarget(model, export.aux_layer_ids)
    except UnsupportedTarget as error:
        logger.warning("trees are counted over the target's texts and not decoded for real: %s", error)
        return None
    proposer, decoded = TreeProposer(draft, export.mapping, shape), list[DecodedTrees]()
    progress = Progress("prompt", len(guessed), title="decoding with trees")
    for one in guessed:
        assert one.trees is not None
        decoded.append(
            decode_trees(
                target,
                proposer,
                one.text,
                one.trees,
                max_new_tokens=settings.max_new_tokens,
                stop_token_ids=stop_token_ids,
            )
        )
        progress.advance()
    progress.close()
    clearest = [max(one.differences, key=lambda each: each.margin) for one in decoded if one.differences]
    unexplained = [one for one in clearest if one.margin >= settings.near_tie]
    differing_counts = sum(one.of == GUESSES for one in unexplained)
    differing_texts = len(unexplained) - differing_counts
    return TreeDecoding(
        counts_agree=not differing_counts,
        identical_texts=not differing_texts,
        differing_counts=differing_counts,
        differing_texts=differing_texts,
        near_ties=len(clearest) - len(unexplained),
        tokens_per_second=sum(one.tokens for one in decoded) / sum(one.seconds for one in decoded),
        prompts=decoded,
    )
