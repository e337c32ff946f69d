"""The TTT step on a GPU: `FusedStep` replaces `ttt_loss` and its backward. Start reading in `step`."""

from eagle_rpc.draft.fused.products import multiplies_fp8
from eagle_rpc.draft.fused.step import FusedStep

__all__ = ["FusedStep", "multiplies_fp8"]
