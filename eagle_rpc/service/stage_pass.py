"""One forward pass of a stage behind the first one, and what the stage adds to the reply.

Legend: B batch, T sequence, R real tokens, W width of captured states, K draft vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import TargetFailed
from eagle_rpc.supervision import (
    BatchRows,
    DraftVocabOnDevice,
    StagePass,
    StageShare,
    StageTarget,
    VocabMapping,
    own_storage,
    read_supervision,
)


class StageForwardPass:
    """Runs the layers of one stage, and in the last stage the head."""

    def __init__(self, target: StageTarget, config: TargetConfig) -> None:
        self._target, self._config = target, config
        self._vocabs: tuple[str, DraftVocabOnDevice] | None = None  # of the last pass, by digest

    @torch.no_grad()
    def run(self, request: StagePass, incoming: Sequence[Tensor] | None) -> tuple[StageShare, list[Tensor]]:
        """The share, and the hidden states for the next stage; both on the CPU."""
        target, tokens = self._target, request.tokens
        place = target.devices[0]
        made = target.run_stage(tokens, [piece.to(place) for piece in incoming or ()])
        last = target.devices[-1]
        rows = BatchRows.of(tokens).to(last)
        if made.output is None:
            own = real_rows(made.aux_hidden_states, rows)
            share = StageShare(aux=None if own is None else own.cpu())
            return share, [own_storage(piece.cpu()) for piece in made.handed_on]
        read = read_supervision(
            made.output,
            rows,
            self._vocab(request.selected_token_ids, last),
            encoding=request.encoding,
            chunk_rows=self._config.chunk_rows,
        ).encode(request.rows)
        share = StageShare(
            aux=read.aux.cpu() if read.aux.numel() else None,
            supervised_rows=read.supervised_rows.cpu(),
            values=read.values.cpu(),
            log_normalizer=read.log_normalizer.cpu(),
            argmax=read.argmax.cpu(),
        )
        return share, []

    def _vocab(self, selected_token_ids: Tensor | None, device: torch.device) -> DraftVocabOnDevice:
        """The lookup tables for the ids [K], kept for passes of the same vocabulary."""
        if selected_token_ids is None:
            raise TargetFailed("the last stage needs the draft vocabulary, got none")
        mapping = VocabMapping.from_token_ids(selected_token_ids, self._target.model_info().vocab_size)
        digest = mapping.digest
        if self._vocabs is None or self._vocabs[0] != digest:
            self._vocabs = digest, DraftVocabOnDevice.of(mapping, device)
        return self._vocabs[1]


def real_rows(aux_BTW: Tensor, rows: BatchRows) -> Tensor | None:
    """The captured states [R, W] of real tokens, on their device; null where a stage captures none."""
    return aux_BTW.flatten(0, 1).index_select(0, rows.real) if aux_BTW.shape[-1] else None
