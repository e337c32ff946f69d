"""Trees of guesses: EAGLE-2's dynamic tree (arXiv 2406.16858), in decoding and over a text that is known.

A tree depends on the tokens before it alone, so its accepted path is the longest one that the text takes: as with
chains, drafts and accepted guesses over a text are those of real decoding.
Legend: A trees, R their frontier nodes one after the other, F frontier nodes of a tree, B children of each, C = F B
candidates of a depth, M candidates of all depths, N guesses kept, T tokens, H draft hidden, W width of all captured
states, K draft vocab.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_rpc.draft.attention_memory import DraftCache
from eagle_rpc.draft.chains import TargetText, read_text
from eagle_rpc.draft.model import Eagle3Draft
from eagle_rpc.supervision import VocabMapping

# Frontier nodes that are computed together: their scores and logits bound the memory.
_ROWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeShape:
    """The size of a dynamic tree."""

    depth: int  # guesses of its longest path
    branching: int  # children of a node, and nodes of each depth that have children
    nodes: int  # guesses that the target verifies, without the root


@dataclass(frozen=True, kw_only=True, slots=True)
class Trees:
    """The guesses of A trees, each after its parent. Node 0 is the root, the last known token; n + 1 is guess n."""

    token_ids_AN: Tensor  # of the target
    parents_AN: Tensor  # nodes
    depths_AN: Tensor  # 1 for the children of the root
    margins_A: Tensor  # fp32, the smallest distance of log-probabilities between a taken and a left node


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTrees:
    """The trees of one text, at the places at which `Chains` begin."""

    num_right: list[int]  # [A], guesses of the longest path that the text takes
    margins_A: Tensor
    num_nodes: int  # guesses of each tree


@torch.no_grad()
def guess_trees(
    draft: Eagle3Draft, mapping: VocabMapping, text: TargetText, aux_TW: Tensor, shape: TreeShape
) -> TextTrees:
    """The tree from every place of `text` at which decoding may draft; arguments as of `guess_chains`."""
    ids_T = torch.tensor(text.ids, device=aux_TW.device)
    slots_A, output_TH, cache = read_text(draft, text, ids_T, aux_TW)
    num_right, margins, num_nodes = list[int](), [aux_TW.new_empty(0, dtype=torch.float32)], 0
    for some_A in slots_A.split(max(1, _ROWS // shape.branching)) if len(slots_A) else ():
        trees = grow_trees(draft, mapping, cache, some_A, output_TH[some_A], shape)
        num_right += _longest_paths(trees, ids_T, some_A, shape.depth)
        margins.append(trees.margins_A)
        num_nodes = trees.token_ids_AN.shape[1]
    return TextTrees(num_right=num_right, margins_A=torch.cat(margins), num_nodes=num_nodes)


def grow_trees(
    draft: Eagle3Draft,
    mapping: VocabMapping,
    cache: DraftCache,
    slots_A: Tensor,
    output_AH: Tensor,
    shape: TreeShape,
) -> Trees:
    """The trees from the cached `slots_A` of the only sequence, where the draft's output is `output_AH`.

    The `branching` candidates of each depth with the highest product of the draft's probabilities have children;
    at the end the `nodes` highest of all candidates stay. The cache is left as it is.
    """
    target_ids_K, memory = mapping.selected_token_ids.to(slots_A.device), cache.chains(slots_A)
    num_trees, width = len(slots_A), min(shape.branching, len(mapping))
    scores_AF, nodes_AF = (
        output_AH.new_zeros(num_trees, 1, dtype=torch.float32),
        slots_A.new_zeros(num_trees, 1),
    )
    margins_A = torch.full_like(scores_AF[:, 0], math.inf)
    candidates, output_RH, num_before = list[tuple[Tensor, ...]](), output_AH, 1
    for depth in range(1, shape.depth + 1):
        said_AFK = draft.lm_head(draft.norm(output_RH)).float().log_softmax(-1).unflatten(0, (num_trees, -1))
        best_AFB, ids_AFB, gaps_AF = _highest(said_AFK, width)
        scores_AC = (scores_AF.unsqueeze(2) + best_AFB).flatten(1)
        token_ids_AC = target_ids_K[ids_AFB].flatten(1)
        depths_AC = torch.full_like(token_ids_AC, depth)
        candidates.append((scores_AC, token_ids_AC, nodes_AF.repeat_interleave(width, dim=1), depths_AC))
        margins_A = torch.minimum(margins_A, gaps_AF.amin(dim=1))
        if depth == shape.depth:
            break
        scores_AF, places_AF, gaps_A = _highest(scores_AC, width)
        margins_A = torch.minimum(margins_A, gaps_A)
        starts_A1 = torch.arange(num_trees, device=slots_A.device).unsqueeze(1) * nodes_AF.shape[1]
        parents_R = (starts_A1 + places_AF // width).flatten()
        nodes_AF, num_before = num_before + places_AF, num_before + scores_AC.shape[1]
        memory.follow(parents_R)
        output_RH = draft.advance(
            token_ids_AC.gather(1, places_AF).flatten()[None],
            draft.carried(output_RH)[parents_R][None],
            (slots_A + depth).repeat_interleave(width)[None],
            memory,
        )[0]
    return _reranked(candidates, margins_A, shape.nodes)


def _reranked(candidates: list[tuple[Tensor, ...]], margins_A: Tensor, num_nodes: int) -> Trees:
    """The highest candidates, in the order of their depths. `candidates`: scores, tokens, parents, depths [A, C]."""
    scores_AM, token_ids_AM, parents_AM, depths_AM = (
        torch.cat(column, 1) for column in zip(*candidates, strict=True)
    )
    _, highest_AN, gaps_A = _highest(scores_AM, num_nodes)
    kept_AN = highest_AN.sort(dim=1).values
    # A candidate is never above its parent, and comes after it where they are equal: parents of kept ones are kept.
    numbers_AN = torch.arange(1, kept_AN.shape[1] + 1, device=kept_AN.device).expand_as(kept_AN)
    renumbered = parents_AM.new_zeros(len(parents_AM), parents_AM.shape[1] + 1)
    renumbered.scatter_(1, kept_AN + 1, numbers_AN)
    return Trees(
        token_ids_AN=token_ids_AM.gather(1, kept_AN),
        parents_AN=renumbered.gather(1, parents_AM.gather(1, kept_AN)),
        depths_AN=depths_AM.gather(1, kept_AN),
        margins_A=torch.minimum(margins_A, gaps_A),
    )


def _highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` highest of the last dimension, of equal ones the first; their places; the gap to the others."""
    ordered, places = scores.sort(dim=-1, descending=True, stable=True)
    gaps = torch.full_like(ordered[..., 0], math.inf)
    if count < scores.shape[-1]:
        gaps = ordered[..., count - 1] - ordered[..., count]
    return ordered[..., :count], places[..., :count], gaps


def _longest_paths(trees: Trees, ids_T: Tensor, slots_A: Tensor, depth: int) -> list[int]:
    """Guesses of the path of each tree that the text takes from its slot on."""
    places_AN = slots_A.unsqueeze(1) + 1 + trees.depths_AN
    said_AN = (places_AN < len(ids_T)) & (trees.token_ids_AN == ids_T[places_AN.clamp(max=len(ids_T) - 1)])
    taken = torch.ones_like(said_AN[:, :1])  # the root, then the guesses
    taken = torch.cat((taken, torch.zeros_like(said_AN)), dim=1)
    for step in range(1, depth + 1):
        taken[:, 1:] |= said_AN & (trees.depths_AN == step) & taken.gather(1, trees.parents_AN)
    return taken[:, 1:].sum(dim=1).tolist()
