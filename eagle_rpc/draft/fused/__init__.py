"""The TTT step on a GPU: `FusedStep` replaces `ttt_loss` and its backward.

step.py              one micro-batch: unroll, judge, backward
unroll.py            the layer over all steps, forward and backward
step_attention.py    attention of a step = causal_attention.py (step 0) + own_slots.py (later steps)
judging.py           last norm, head and loss over chunks of rows
formulas.py          the operations between the matrix products
weights.py           copies of the weights in the compute dtype
triton_X.py          the Triton kernels of formulas.py, own_slots.py and draft/losses.py
"""

from eagle_rpc.draft.fused.step import FusedStep

__all__ = ["FusedStep"]
