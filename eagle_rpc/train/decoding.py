"""What decoding of the validation answers would accept, counted as `job=evaluate` counts it.

The answers are the target's own texts. What it would say after their ends is not in the data: the target is
asked for it once, a token a request.
Legend: T tokens, C chats of a row, H target hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from eagle_rpc.data import Example
from eagle_rpc.data.collate import collate
from eagle_rpc.draft import DecodingCounts, Eagle3Draft, TargetText, guess_chains, replay
from eagle_rpc.supervision import Eagle3TargetBackend, Eagle3TargetBatch, TokenBatch
from eagle_rpc.train.record import RunRecord


def answers_of(batch: TokenBatch) -> list[TargetText]:
    """Each answer of a batch, with all tokens of its chat before it as the prompt."""
    texts = []
    for row, real_T in enumerate(batch.attention_mask.bool()):
        chats_T = (
            torch.zeros_like(batch.input_ids[row]) if batch.segment_ids is None else batch.segment_ids[row]
        )
        _, lengths_C = chats_T.unique_consecutive(return_counts=True)
        for places_T in torch.arange(len(real_T)).split(lengths_C.tolist()):
            chat_T = places_T[real_T[places_T]]
            ids, said = (tensor[row, chat_T].tolist() for tensor in (batch.input_ids, batch.loss_mask))
            # Nothing stands before the first token from which it could be said.
            starts = [t for t in range(1, len(ids)) if said[t] and (t == 1 or not said[t - 1])]
            for start in starts:
                end = next((t for t in range(start, len(ids)) if not said[t]), len(ids))
                texts.append(TargetText(prompt_ids=ids[:start], token_ids=ids[start:end]))
    return texts


class DecodedAnswers:
    """The validation answers of one trainer, at the target of `record`."""

    def __init__(
        self,
        texts: Sequence[TargetText],
        backend: Eagle3TargetBackend,
        record: RunRecord,
        *,
        batch_size: int,
        num_draft_tokens: int,
    ) -> None:
        """Asks the target how it would go on after the answers, as far as its context and a draft reach."""
        self._backend, self._record = backend, record
        self._batch_size, self._num_draft_tokens = batch_size, num_draft_tokens
        # Answers of like length together need little padding.
        self._texts = sorted(texts, key=lambda text: len(text.ids))
        open_texts = list(range(len(self._texts)))
        for _ in range(num_draft_tokens - 1):
            open_texts = self._ask_next_tokens(open_texts)

    def _ask_next_tokens(self, indices: Sequence[int]) -> list[int]:
        """Adds a token after the end of these texts; returns the texts that got one.

        A token outside the draft vocabulary is not told: no guess can be right there, and none matters
        behind it.
        """
        indices = [index for index in indices if len(self._texts[index].ids) < self._record.target.max_length]
        extended, token_ids = list[int](), self._record.mapping.selected_token_ids
        for first, batch in self._supervised([self._texts[index] for index in indices], next_token=True):
            rows_N = batch.supervised_rows // batch.tokens.shape[1]
            for row, draft_id in zip(rows_N.tolist(), batch.argmax.tolist(), strict=True):
                if draft_id >= 0:
                    extended.append(indices[first + row])
                    text = self._texts[extended[-1]]
                    after_end = [*text.after_end, int(token_ids[draft_id])]
                    self._texts[extended[-1]] = replace(text, after_end=after_end)
        return extended

    def counts(self, draft: Eagle3Draft) -> DecodingCounts:
        """The counts of all answers; `draft` guesses in the format of its weights, which have to be whole."""
        k, mapping = self._num_draft_tokens, self._record.mapping
        counts = DecodingCounts([0] * k)
        for first, batch in self._supervised(self._texts, next_token=False):
            for text, aux_TW in zip(self._texts[first:], batch.aux_hidden_states, strict=False):
                accepted = replay(guess_chains(draft, mapping, text, aux_TW, k).num_right, k)
                counts.add(DecodingCounts.of_text(accepted, k, len(text.token_ids)))
        return counts

    def _supervised(
        self, texts: Sequence[TargetText], *, next_token: bool
    ) -> Iterator[tuple[int, Eagle3TargetBatch]]:
        """Captured states of the texts in batches, each with the index of its first text.

        `next_token`: also the target's choice after the last token of each.
        """
        firsts, batches = [0], list[TokenBatch]()
        limit = self._record.target.max_batch_tokens
        while firsts[-1] < len(texts):
            group = texts[firsts[-1] : firsts[-1] + self._batch_size]
            while len(group) > 1 and len(group) * max(len(text.ids) for text in group) > limit:
                group = group[:-1]
            batches.append(_batch_of(group, next_token=next_token))
            firsts.append(firsts[-1] + len(group))
        yield from zip(firsts, self._backend.stream(batches), strict=False)


def _batch_of(texts: Sequence[TargetText], *, next_token: bool) -> TokenBatch:
    """Row t is judged by the output of token t + 1, so the last row has the choice after the last token."""
    examples = [
        Example(ids_T, (torch.arange(len(ids_T)) == len(ids_T) - 1) & next_token)
        for ids_T in (torch.tensor(text.ids) for text in texts)
    ]
    return collate([[one] for one in examples], max(len(one.input_ids) for one in examples), packed=False)
