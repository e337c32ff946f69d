"""Greedy decoding with trees of guesses, which the target verifies in one call each.

Legend: N guesses, P nodes with the root, L tokens that the target has read, W width of all captured states.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from eagle_rpc.draft import Eagle3Draft, TreeShape, grow_trees
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.evaluate.decoding.greedy import GreedyTarget, TargetStep
from eagle_rpc.evaluate.decoding.speculative import Decoding, Verified, decode_in_rounds
from eagle_rpc.supervision import VocabMapping
from eagle_rpc.target.probes import ROUNDING, WHOLE_MODEL, refusing_failures, relative_error


class TreeProposer:
    """Trees of guesses of an EAGLE-3 draft."""

    def __init__(self, draft: Eagle3Draft, mapping: VocabMapping, shape: TreeShape) -> None:
        self._draft, self._mapping, self.shape = draft, mapping, shape
        self.start()

    def start(self) -> None:
        """Forgets the sequence."""
        self._cache = self._draft.new_cache()

    def propose(self, next_token_ids: Sequence[int], aux_NW: Tensor) -> tuple[list[int], list[int]]:
        """Guesses in the order of `Trees`, and their parents; arguments as of `DraftProposer.propose`."""
        ids_1N = torch.tensor([next_token_ids], device=aux_NW.device)
        hidden_1NH, start = self._draft.fuse(aux_NW[None]), self._cache.length
        slots_N = torch.arange(start, start + len(next_token_ids), device=aux_NW.device)
        output_1NH = self._draft.advance(ids_1N, hidden_1NH, slots_N[None], self._cache)
        tree = grow_trees(
            self._draft, self._mapping, self._cache, slots_N[-1:], output_1NH[:, -1], self.shape
        )
        return tree.token_ids_AN[0].tolist(), tree.parents_AN[0].tolist()


class TreeTarget(GreedyTarget):
    """A target that reads a tree of tokens, each of which attends to the sequence and to its own path."""

    def __init__(self, model: PreTrainedModel, aux_layer_ids: Sequence[int] | None = None) -> None:
        """Raises as `GreedyTarget`, and `UnsupportedTarget` if the target does not read trees exactly."""
        super().__init__(model, aux_layer_ids)
        rule = f"to verify trees, {type(model).__name__} must take a mask between tokens"
        with refusing_failures(rule), torch.inference_mode():
            self._probe_trees()
        self.start()

    def read_tree(self, token_ids: Sequence[int], parents: Sequence[int]) -> TargetStep:
        """Appends a root and N guesses, and predicts the next token after each of these P nodes.

        `parents` are the nodes before the guesses, 0 the root. Before the next call `keep_path` has to follow.
        """
        seen_PP, depths = torch.eye(len(token_ids), dtype=torch.bool), [0]
        for node, parent in enumerate(parents, start=1):
            seen_PP[node] |= seen_PP[parent]
            depths.append(depths[parent] + 1)
        device, dtype = self._model.device, self._model.dtype
        seen = torch.cat((torch.ones(len(token_ids), self._length, dtype=torch.bool), seen_PP), dim=1)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        positions_P = torch.tensor(depths, device=device) + self._length
        return self.read(
            token_ids,
            predictions=len(token_ids),
            attention_mask=mask[None, None].to(device),
            position_ids=positions_P[None],
        )

    def keep_path(self, length: int, nodes: Sequence[int]) -> None:
        """Of a tree that was read after `length` tokens, keeps only these nodes."""
        places = torch.tensor([*range(length), *(length + node for node in nodes)], device=self._model.device)
        for layer in self._cache.layers:
            assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
            layer.keys = layer.keys.index_select(-2, places)
            layer.values = layer.values.index_select(-2, places)
        self._length = len(places)

    def _probe_trees(self) -> None:
        """Two paths of a tree against passes without a cache, and a token after the kept one."""
        name = type(self._model).__name__
        # Other layers forget tokens, or keep states of all of them.
        kinds = sorted(
            {type(layer).__name__ for layer in self._cache.layers if type(layer) is not DynamicLayer}
        )
        if kinds:
            rule = f"to verify trees, the cache of {name} must keep the keys of every token"
            raise UnsupportedTarget(f"{rule}, got {', '.join(kinds)}")
        ids = self._probe_ids(9)
        self.start()
        self.read(ids[:4], predictions=1)
        # Root 4 with the paths 5, 7 and 6.
        tree = self.read_tree(ids[4:8], [0, 0, 1]).logits_PV
        self.keep_path(4, [0, 1, 3])
        after = self.read(ids[8:], predictions=1).logits_PV
        got = torch.cat((tree[[0, 1, 3]], after, tree[[2]]))
        device = self._model.device
        paths = [[*ids[:6], *ids[7:]], [*ids[:5], ids[6]]]
        expected = [
            self._model(input_ids=torch.tensor([path], device=device), use_cache=False).logits[0]
            for path in paths
        ]
        error = relative_error(got, torch.cat((expected[0][4:], expected[1][5:])))
        if not error <= WHOLE_MODEL * ROUNDING[self._model.dtype]:
            rule = f"to verify trees, {name} must give of a tree what it gives of its paths"
            raise UnsupportedTarget(f"{rule}, got a relative error of {error:.1e}")


def decode_with_trees(
    target: TreeTarget,
    proposer: TreeProposer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
) -> Decoding:
    """The token ids of `decode_greedily`, with a tree of guesses for each target call.

    Raises `ConfigError` if prompt, text and the deepest guesses beyond its end do not fit the target's context.
    """

    def verify(next_token_ids: Sequence[int], aux_NW: Tensor, length: int) -> Verified:
        guesses, parents = proposer.propose(next_token_ids, aux_NW)
        step = target.read_tree([next_token_ids[-1], *guesses], parents)
        child_of = {
            (parent, guess): node
            for node, (parent, guess) in enumerate(zip(parents, guesses, strict=True), 1)
        }
        choices, margins, path = step.choices, step.margins, [0]
        while (child := child_of.get((path[-1], choices[path[-1]]))) is not None:
            path.append(child)
        target.keep_path(length, path)
        along_path = [choices[node] for node in path], [margins[node] for node in path]
        return Verified(*along_path, guess_margins=[], aux_NW=step.aux_NW[path])

    proposer.start()
    return decode_in_rounds(
        target,
        verify,
        prompt_ids,
        longest=proposer.shape.depth,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
    )
