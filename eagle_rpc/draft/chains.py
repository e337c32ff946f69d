"""The guesses that decoding would make over a text that is known: chains from all of its tokens at once.

While the guesses of a chain hold they are the text, so every chain reads the text; what it guesses after a
wrong one does not matter. `replay` then walks the text as decoding does, so that its drafts and accepted
guesses are those of real decoding.
Legend: T tokens, H draft hidden, W width of all captured states, A chains, S guesses of a chain, K draft vocab.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_rpc.draft.attention_memory import DraftCache
from eagle_rpc.draft.model import Eagle3Draft
from eagle_rpc.supervision import VocabMapping

# Chains that are guessed together: their scores and logits bound the memory.
_CHAINS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetText:
    """The target's own answer to a prompt, and what it would go on to say."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]  # the answer, with its stop token
    after_end: Sequence[int] = ()  # greedy; a guess beyond the known tokens counts as wrong

    @property
    def ids(self) -> list[int]:
        return [*self.prompt_ids, *self.token_ids, *self.after_end]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chains:
    """The chains of one text: entry n - 1 begins when n of its tokens are known, up to all but the last."""

    num_right: list[int]  # [A], guesses before the first wrong one
    margins_AS: Tensor  # [A, S] fp32, distance between the draft's two best logits at each guess


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnGuesses:
    """Guesses that are drawn from the draft's distribution, for a text drawn from the target's.

    Speculative sampling accepts a guess x with probability min(1, p(x) / q(x)), p the target's and q the
    draft's probability, and otherwise draws from what is left of p (Leviathan et al. 2023, arXiv:2211.17192,
    algorithm 1). So the token t of the text was an accepted guess with probability min(1, q(t) / p(t)).
    """

    temperature: float  # of both distributions
    log_probs_T: Tensor  # fp32, the target's of each token given those before it; prompts are not read
    generator: torch.Generator  # on the CPU


@torch.no_grad()
def guess_chains(
    draft: Eagle3Draft,
    mapping: VocabMapping,
    text: TargetText,
    aux_TW: Tensor,
    num_guesses: int,
    drawn: DrawnGuesses | None = None,
) -> Chains:
    """`num_guesses` guesses from every place of `text` at which decoding may draft.

    `aux_TW` are the target's captured states of its tokens, at least of all up to the last but one. With
    `drawn` null the draft guesses its most likely token.
    """
    ids_T = torch.tensor(text.ids, device=aux_TW.device)
    starts_A, output_TH, cache = read_text(draft, text, ids_T, aux_TW)
    if not len(starts_A):
        return Chains(num_right=[], margins_AS=aux_TW.new_empty(0, num_guesses, dtype=torch.float32))
    judge = _Judge(mapping, ids_T, drawn)
    parts = [
        _guess(draft, ids_T, slots_A, output_TH[slots_A], cache, judge, num_guesses)
        for slots_A in starts_A.split(_CHAINS)
    ]
    right_AS, margins_AS = (torch.cat(part) for part in zip(*parts, strict=True))
    return Chains(num_right=right_AS.cumprod(dim=1).sum(dim=1).tolist(), margins_AS=margins_AS)


def read_text(
    draft: Eagle3Draft, text: TargetText, ids_T: Tensor, aux_TW: Tensor
) -> tuple[Tensor, Tensor, DraftCache]:
    """The slots [A] from which decoding may draft, the draft's output at all slots up to them, its cache.

    Slot t pairs the states of token t with the id of token t + 1, and guesses token t + 2.
    """
    first = len(text.prompt_ids) - 1
    end = first + len(text.token_ids) - 1
    slots_T, cache = torch.arange(end, device=ids_T.device), draft.new_cache()
    if end == first:
        return slots_T[first:], aux_TW.new_empty(0, draft.config.hidden_size), cache
    fused_1TH = draft.fuse(aux_TW[None, :end])
    output_TH = draft.advance(ids_T[None, 1 : end + 1], fused_1TH, slots_T[None], cache)[0]
    return slots_T[first:], output_TH, cache


def _guess(
    draft: Eagle3Draft,
    ids_T: Tensor,
    slots_A: Tensor,
    output_AH: Tensor,
    cache: DraftCache,
    judge: "_Judge",
    num_guesses: int,
) -> tuple[Tensor, Tensor]:
    """Right guesses and margins [A, S] of the chains from `slots_A`, where the draft's output is `output_AH`."""
    memory, right, margins = cache.chains(slots_A), list[Tensor](), list[Tensor]()
    for step in range(num_guesses):
        if step:
            # Beyond the known tokens the guess before counts as wrong, and any id does.
            read_A = ids_T[(slots_A + 1 + step).clamp(max=len(ids_T) - 1)]
            hidden_1AH = draft.carried(output_AH)[None]
            output_AH = draft.advance(read_A[None], hidden_1AH, (slots_A + step)[None], memory)[0]
        logits_AK = draft.lm_head(draft.norm(output_AH)).float()
        right.append(judge.right(logits_AK, slots_A + 2 + step))
        best_A2 = logits_AK.topk(min(2, logits_AK.shape[1]), dim=-1).values
        margins.append(best_A2[:, 0] - best_A2[:, -1])
    return torch.stack(right, dim=1), torch.stack(margins, dim=1)


class _Judge:
    """Says which guesses are the tokens of a text."""

    def __init__(self, mapping: VocabMapping, ids_T: Tensor, drawn: DrawnGuesses | None) -> None:
        self._target_ids_K = mapping.selected_token_ids.to(ids_T.device)
        self._ids_T, self._drawn = ids_T, drawn

    def right(self, logits_AK: Tensor, places_A: Tensor) -> Tensor:
        """Whether the guesses of `logits` are the tokens at `places`; none beyond the known tokens is."""
        known_A = places_A < len(self._ids_T)
        tokens_A = self._ids_T[places_A.clamp(max=len(self._ids_T) - 1)]
        if self._drawn is None:
            return (self._target_ids_K[logits_AK.argmax(dim=-1)] == tokens_A) & known_A
        draft_ids_A = torch.searchsorted(self._target_ids_K, tokens_A).clamp(max=len(self._target_ids_K) - 1)
        known_A &= self._target_ids_K[draft_ids_A] == tokens_A
        guessed_AK = (logits_AK / self._drawn.temperature).log_softmax(dim=-1)
        guessed_A = guessed_AK.gather(1, draft_ids_A[:, None]).squeeze(1)
        said_A = self._drawn.log_probs_T[places_A.clamp(max=len(self._ids_T) - 1)]
        chance_A = torch.rand(len(places_A), generator=self._drawn.generator).to(said_A.device)
        return (chance_A < (guessed_A - said_A).exp()) & known_A


def replay(num_right: Sequence[int], num_draft_tokens: int) -> list[int]:
    """The accepted guesses of each draft that decoding makes, with chains of at most `num_draft_tokens`.

    A draft follows every target call that does not end the text, prefill included. `num_right` as in
    `Chains`: a shorter chain is the beginning of a longer one.
    """
    accepted, known = list[int](), 1
    while known <= len(num_right):
        accepted.append(min(num_right[known - 1], num_draft_tokens))
        known += accepted[-1] + 1
    return accepted
