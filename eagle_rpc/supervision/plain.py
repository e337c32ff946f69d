"""The plain, dense form of supervision, as NeMo AutoModel's remote server defines it.

Legend: B batch, T sequence, H target hidden, V target vocab, K draft vocab.
"""

from typing import Any

import torch
from torch import Tensor

from eagle_rpc.supervision.shift import shift_left


def compute_supervision(
    target_wrapper: Any,
    selected_token_ids: Tensor,
    selected_token_mask: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
) -> dict[str, Tensor]:
    """Runs the target once and returns the reference's five keys.

    Args:
        target_wrapper: an `Eagle3Target`.
        selected_token_ids: [K] int64 target ids of the draft vocabulary.
        selected_token_mask: [V] bool, membership in the draft vocabulary.
        input_ids, attention_mask, loss_mask: [B, T].

    Returns:
        `aux_hidden_states` [B, T, 3H] (not shifted), `target_probs` [B, T, K] fp32, `position_mask` [B, T, 1] bool,
        and `input_ids`, `loss_mask` [B, T] shifted left by one with zero fill.

    Source: `compute_supervision` and `_compute_target_distribution` of nemo_automodel.components.speculative.eagle.
    This form holds [B, T, V]: for tests, tools and small models; the service uses `encode_supervision`.
    """
    output = target_wrapper.generate_batch(input_ids, attention_mask, loss_mask)
    logits_BTV = getattr(output, "logits", None)
    if logits_BTV is None:
        batch, length = input_ids.shape
        flat = output.project(output.last_hidden_state.flatten(0, 1))
        logits_BTV = shift_left(flat.view(batch, length, -1))
    shifted_loss_mask = shift_left(loss_mask)
    in_draft_vocab = selected_token_mask[logits_BTV.float().argmax(dim=-1)]
    return {
        "aux_hidden_states": output.aux_hidden_states,
        "target_probs": logits_BTV.index_select(-1, selected_token_ids).float().softmax(dim=-1),
        "position_mask": (in_draft_vocab & shifted_loss_mask.to(torch.bool)).unsqueeze(-1),
        "input_ids": shift_left(input_ids),
        "loss_mask": shifted_loss_mask,
    }
