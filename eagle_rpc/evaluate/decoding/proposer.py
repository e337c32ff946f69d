"""The draft as a proposer: it guesses the next tokens of a sequence.

Legend: N newly verified tokens, H draft hidden, W width of all captured states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_rpc.draft.model import Eagle3Draft
from eagle_rpc.supervision import VocabMapping


@dataclass(frozen=True, slots=True)
class Proposal:
    """A chain of guesses."""

    token_ids: list[int]  # of the target vocabulary
    margins: list[float]  # between the draft's two best logits at each guess


class DraftProposer:
    """A chain of guesses of an EAGLE-3 draft, as vLLM makes it.

    The first guess reads the target's hidden states, each later one the draft's output for the guess before.
    Guesses leave the cache again: verified ones are computed anew from the target's hidden states.
    """

    def __init__(self, draft: Eagle3Draft, mapping: VocabMapping, num_draft_tokens: int) -> None:
        self._draft = draft
        self._target_ids: list[int] = mapping.selected_token_ids.tolist()
        self.num_draft_tokens = num_draft_tokens
        self.start()

    def start(self) -> None:
        """Forgets the sequence."""
        self._cache = self._draft.new_cache()

    def propose(self, next_token_ids: Sequence[int], aux_NW: Tensor) -> Proposal:
        """The next `num_draft_tokens` guesses after the last of `next_token_ids`.

        The target has read N more tokens, with the hidden states `aux_NW`. `next_token_ids` are the N tokens
        one place later; the target has chosen the last of them and not read it yet. Afterwards the cache
        holds verified tokens only.
        """
        ids = list(next_token_ids)
        hidden_1NH = self._draft.fuse(aux_NW[None])
        verified = self._cache.length + len(ids)
        guesses, margins = list[int](), list[float]()
        while True:
            ids_1N = torch.tensor([ids], device=aux_NW.device)
            carried_1NH, logits_1K = self._draft.decode_step(ids_1N, hidden_1NH, self._cache)
            best_2 = logits_1K[0].float().topk(min(2, logits_1K.shape[1])).values
            guesses.append(self._target_ids[int(logits_1K.argmax())])
            margins.append(float(best_2[0] - best_2[-1]))
            if len(guesses) == self.num_draft_tokens:
                self._cache.truncate(verified)
                return Proposal(guesses, margins)
            ids, hidden_1NH = guesses[-1:], carried_1NH[:, -1:]
