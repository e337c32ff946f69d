"""Training-time test of every slot, with attention as one explicit mask: the judge of the unroll of live slots.

Legend: B batch, T sequence, S steps, N rows, H hidden, Q query heads, J key heads, D head width.
"""

import torch
from torch import Tensor

from eagle_rpc.draft import Eagle3Draft, Objective, TTTResult
from eagle_rpc.draft.chunked_loss import head_loss
from eagle_rpc.draft.rope import rotate
from eagle_rpc.draft.ttt import judged_slots, positions_of, result_of
from eagle_rpc.supervision import Eagle3TargetBatch, shift_left


def full_ttt_loss(
    draft: Eagle3Draft, batch: Eagle3TargetBatch, objective: Objective, denominators_S: Tensor
) -> TTTResult:
    """As `ttt_loss`."""
    slots_NS, valid_NS = judged_slots(batch, objective.steps)
    outputs_SNH = [output_BTH.flatten(0, 1) for output_BTH in _outputs(draft, batch, objective.steps)]
    judged_NSH = torch.stack([outputs_SNH[step][slots_NS[:, step]] for step in range(objective.steps)], dim=1)
    rows = objective.rows_of(batch, valid_NS, denominators_S)
    total, losses_NS, predicted_NS = head_loss(draft.norm(judged_NSH), draft.lm_head.weight, rows)
    return result_of(batch, total, losses_NS, predicted_NS, slots_NS, valid_NS)


def _outputs(draft: Eagle3Draft, batch: Eagle3TargetBatch, steps: int) -> list[Tensor]:
    """Outputs before the norm [B, T, H] of each step."""
    layer, attention, length = draft.midlayer, draft.midlayer.self_attn, batch.input_ids.shape[1]
    repeats = draft.config.num_attention_heads // draft.config.num_key_value_heads
    chats_BT = batch.tokens.segment_ids
    chats_BT = torch.zeros_like(batch.input_ids) if chats_BT is None else chats_BT
    causal_BTT = (chats_BT.unsqueeze(2) == chats_BT.unsqueeze(1)).tril()
    own_BTT = torch.eye(length, dtype=torch.bool).expand_as(causal_BTT)
    ids_BT, hidden_BTH, outputs, keys, values = (
        batch.input_ids, draft.fuse(batch.aux_hidden_states), [], [], []
    )  # fmt: skip
    for step in range(steps):
        normed_BTH = layer.hidden_norm(hidden_BTH)
        embeds_BTH = layer.input_layernorm(draft.embed_tokens(ids_BT).to(hidden_BTH.dtype))
        inputs_BT2H = torch.cat((embeds_BTH, normed_BTH), dim=-1)
        queries_BQTD, keys_BJTD, values_BJTD = (
            projection(inputs_BT2H).unflatten(-1, (-1, draft.config.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        tables = draft.rotary.tables(positions_of(batch) + step)
        keys.append(rotate(keys_BJTD, tables).repeat_interleave(repeats, dim=1))
        values.append(values_BJTD.repeat_interleave(repeats, dim=1))
        scores = rotate(queries_BQTD, tables) @ torch.cat(keys, dim=2).mT / draft.config.head_dim**0.5
        visible = torch.cat((causal_BTT, *[own_BTT] * step), dim=-1).unsqueeze(1)
        shares = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        attended_BTQ = (shares @ torch.cat(values, dim=2)).transpose(1, 2).flatten(2)
        residual_BTH = normed_BTH if layer.norm_before_residual else hidden_BTH
        hidden_BTH = residual_BTH + attention.o_proj(attended_BTQ)
        hidden_BTH = hidden_BTH + layer.mlp(layer.post_attention_layernorm(hidden_BTH))
        outputs.append(hidden_BTH)
        hidden_BTH = draft.norm(hidden_BTH) if draft.config.norm_output else hidden_BTH
        ids_BT = shift_left(ids_BT)
    return outputs
