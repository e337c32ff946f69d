"""A target of several stages as its server sees it, and its passes: the first stage runs here.

Legend: B batch, T sequence, R real tokens, W width of captured states.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.rpc import ServiceCall
from eagle_rpc.service.forward_pass import PassRequest
from eagle_rpc.service.sessions import Session
from eagle_rpc.service.stage_chain import StageChain
from eagle_rpc.service.stage_pass import real_rows
from eagle_rpc.supervision import (
    BatchRows,
    DraftHead,
    EncodedSupervision,
    FirstStageTarget,
    ModelInfo,
    StagePass,
    StageShare,
    combined_fingerprint,
    form_of_pass,
    own_storage,
)


class StagedTarget:
    """An `Eagle3Target` whose passes are those of `StagedPasses`."""

    takes_host_tokens = True

    def __init__(self, first: FirstStageTarget, chain: StageChain) -> None:
        """`chain`: with all stages connected."""
        self._first, self._chain = first, chain
        self.devices: Sequence[torch.device] = first.devices
        """Of the first stage, from which replies leave."""

    def generate_batch(self, *unused: Any, **also_unused: Any) -> NoReturn:
        """There is no output in one process."""
        raise UnsupportedTarget(
            "a target of several stages gives no hidden states of its own: ask its server"
        )

    def get_input_embeddings(self) -> nn.Embedding:
        return self._first.get_input_embeddings()

    def model_info(self) -> ModelInfo:
        """As one process that has all layers describes itself."""
        infos = self._chain.infos
        return dataclasses.replace(
            self._first.model_info(),
            weights_fingerprint=combined_fingerprint([info.weights for info in infos]),
            form=form_of_pass(
                infos[0].attention,
                fused_rows=infos[-1].fused_rows,
                fused_mlps=sum(info.num_fused_mlps for info in infos),
            ),
        )

    def draft_head(self, selected_token_ids: Tensor) -> DraftHead:
        head = self._chain.ask_last("draft_head", selected_token_ids)
        assert isinstance(head, DraftHead)
        return head

    def probe_head(self, selected_token_ids: Tensor) -> None:
        self._chain.ask_last("probe_head", selected_token_ids)


class StagedPasses:
    """Runs requests through all stages, in place of `ForwardPass`."""

    def __init__(self, first: FirstStageTarget, chain: StageChain, config: RpcConfig) -> None:
        self._first, self.chain = first, chain
        self._seconds = config.request_timeout
        self._numbers = itertools.count()
        self.device = first.devices[-1]

    @property
    def most_before(self) -> int:
        """Unfinished passes beside which one more may start: each stage works on one, on GPUs each of its GPUs."""
        on_gpus = self.device.type == "cuda"
        return self.chain.count * (len(self._first.devices) if on_gpus else 1)

    @torch.no_grad()
    def start(self, request: PassRequest) -> "StartedStages":
        """Runs the first stage, and hands its hidden states on. Raises `TargetDraining` without all stages."""
        session, tokens, number = request.session, request.tokens, next(self._numbers)
        chains: list[str] = []

        def for_stage(chain: str, is_last: bool) -> StagePass:
            chains.append(chain)
            return StagePass(
                chain=chain,
                number=number,
                tokens=tokens,
                encoding=session.spec.encoding,
                rows=session.spec.rows,
                selected_token_ids=own_storage(session.vocab.selected_token_ids.cpu()) if is_last else None,
                seconds_left=self._seconds,
            )

        calls = self.chain.begin(for_stage)
        try:
            made = self._first.run_stage(tokens, None)
            handed_on = [own_storage(piece.cpu()) for piece in made.handed_on]
        except Exception:
            # The other stages wait for these hidden states, whatever went wrong here.
            self.chain.hand_on(chains[0], number, None)
            raise
        sent = self.chain.hand_on(chains[0], number, handed_on)
        rows = BatchRows.of(tokens).to(self.device)
        own = real_rows(made.aux_hidden_states, rows)
        return StartedStages(self, session, StageShare(aux=own), sent, calls)

    def assemble(self, session: Session, shares: Sequence[StageShare]) -> EncodedSupervision:
        """The reply from what all stages add to it."""
        last = shares[-1]
        assert last.supervised_rows is not None and last.values is not None
        assert last.log_normalizer is not None and last.argmax is not None
        through_host = session.spec.through_host or last.supervised_rows.numel() == 0
        device = torch.device("cpu") if through_host else self.device
        return EncodedSupervision(
            encoding=session.spec.encoding,
            aux=self._side_by_side([share.aux for share in shares]).to(device),
            supervised_rows=last.supervised_rows.to(device),
            values=last.values.to(device),
            log_normalizer=last.log_normalizer.to(device),
            argmax=last.argmax.to(device),
        )

    def _side_by_side(self, parts: Sequence[Tensor | None]) -> Tensor:
        """[R, W] in the order of the captured layers, which need not be that of the layers."""
        pieces: dict[int, Tensor] = {}
        for info, part in zip(self.chain.infos, parts, strict=True):
            if part is not None:
                pieces |= zip(info.captured, part.chunk(len(info.captured), dim=-1), strict=True)
        return torch.cat([pieces[place].to(self.device) for place in sorted(pieces)], dim=-1)


class StartedStages:
    """A pass that the stages behind the first one work on."""

    def __init__(
        self,
        passes: StagedPasses,
        session: Session,
        own: StageShare,
        sent: ServiceCall,
        calls: list[ServiceCall],
    ) -> None:
        self._passes, self._session, self._own = passes, session, own
        self._sent, self._calls = sent, calls
        self._shares: list[StageShare] | None = None  # of all stages, once they are there

    @property
    def is_done(self) -> bool:
        """Whether `finish` would not wait."""
        return all(call.done for call in (self._sent, *self._calls))

    def wait(self) -> None:
        """Waits for the other stages.

        Raises the error of the first stage that failed, and `TargetDraining` if one is lost.
        """
        if self._shares is not None:
            return
        chain = self._passes.chain
        chain.result_of(self._sent)
        shares = [self._own]
        for call in self._calls:
            share = chain.result_of(call)
            assert isinstance(share, StageShare)
            shares.append(share)
        self._shares = shares

    def finish(self) -> EncodedSupervision:
        """The supervision, as `wait`. To be called once: what the stages sent is dropped."""
        self.wait()
        shares, self._shares = self._shares, None
        assert shares is not None, "the stages were waited for"
        return self._passes.assemble(self._session, shares)
