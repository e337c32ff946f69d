"""Supervision in the reference's dense form.

Legend: B batch, T sequence, H target hidden, V target vocab, K draft vocab.
"""

import torch
from torch import Tensor

from eagle_rpc.supervision.output import TargetOutput
from eagle_rpc.supervision.target import PlainTarget
from eagle_rpc.supervision.tensors import shift_left


def compute_supervision(
    target_wrapper: PlainTarget,
    selected_token_ids: Tensor,
    selected_token_mask: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
) -> dict[str, Tensor]:
    """Runs the target once on [B, T] tensors on its device and returns the reference's five keys.

    `selected_token_ids` [K] int64 are the target ids of the draft vocabulary, `selected_token_mask` [V] bool
    marks them. Returns `aux_hidden_states` [B, T, 3H], not shifted; `target_probs` [B, T, K] fp32;
    `position_mask` [B, T, 1] bool; `input_ids` and `loss_mask` [B, T], shifted left by one with zero fill.

    Source: the functions of this name and `_compute_target_distribution` in
    nemo_automodel.components.speculative.eagle. It holds [B, T, V]: for tests, tools and small models.
    """
    output = target_wrapper.generate_batch(input_ids, attention_mask, loss_mask)
    if isinstance(output, TargetOutput):
        flat = output.project(output.last_hidden_state.flatten(0, 1))
        logits_BTV = shift_left(flat.view(*input_ids.shape, -1))
    else:
        logits_BTV = output.logits
    shifted_loss_mask = shift_left(loss_mask)
    in_draft_vocab = selected_token_mask[logits_BTV.float().argmax(dim=-1)]
    return {
        "aux_hidden_states": output.aux_hidden_states,
        "target_probs": logits_BTV.index_select(-1, selected_token_ids).float().softmax(dim=-1),
        "position_mask": (in_draft_vocab & shifted_loss_mask.to(torch.bool)).unsqueeze(-1),
        "input_ids": shift_left(input_ids),
        "loss_mask": shifted_loss_mask,
    }
