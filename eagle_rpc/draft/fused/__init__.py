"""The TTT step at the speed of a GPU: `FusedStep` stands in for `ttt_loss` and its backward."""

from eagle_rpc.draft.fused.step import FusedStep

__all__ = ["FusedStep"]
