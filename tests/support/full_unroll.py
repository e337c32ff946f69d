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
    layers = [_Layer(draft, batch, number) for number in range(draft.config.num_layers)]
    ids_BT, hidden_BTH, outputs = batch.input_ids, draft.fuse(batch.aux_hidden_states), []
    for _ in range(steps):
        normed_BTH = draft.midlayer.hidden_norm(hidden_BTH)
        embeds_BTH = draft.midlayer.input_layernorm(draft.embed_tokens(ids_BT).to(hidden_BTH.dtype))
        residual_BTH = normed_BTH if draft.config.norm_before_residual else hidden_BTH
        hidden_BTH = layers[0].step(torch.cat((embeds_BTH, normed_BTH), dim=-1), residual_BTH)
        for layer in layers[1:]:
            hidden_BTH = layer.step(layer.module.input_layernorm(hidden_BTH), hidden_BTH)
        outputs.append(hidden_BTH)
        hidden_BTH = draft.norm(hidden_BTH) if draft.config.norm_output else hidden_BTH
        ids_BT = shift_left(ids_BT)
    return outputs


class _Layer:
    """One layer with the keys and values of all its steps."""

    def __init__(self, draft: Eagle3Draft, batch: Eagle3TargetBatch, number: int) -> None:
        self.module = draft.layers[str(number)] if number else draft.midlayer
        self._draft, self._positions = draft, positions_of(batch)
        chats_BT = batch.tokens.segment_ids
        chats_BT = torch.zeros_like(batch.input_ids) if chats_BT is None else chats_BT
        self._chat_BTT = chats_BT.unsqueeze(2) == chats_BT.unsqueeze(1)
        self._keys, self._values = [], []

    def step(self, inputs: Tensor, residual_BTH: Tensor) -> Tensor:
        attention, config, step = self.module.self_attn, self._draft.config, len(self._keys)
        repeats = config.num_attention_heads // config.num_key_value_heads
        queries_BQTD, keys_BJTD, values_BJTD = (
            projection(inputs).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        tables = self._draft.rotary.tables(self._positions + step)
        self._keys.append(rotate(keys_BJTD, tables).repeat_interleave(repeats, dim=1))
        self._values.append(values_BJTD.repeat_interleave(repeats, dim=1))
        scores = rotate(queries_BQTD, tables) @ torch.cat(self._keys, dim=2).mT / config.head_dim**0.5
        shares = scores.masked_fill(~self._visible(step), -torch.inf).softmax(dim=-1)
        attended_BTQ = (shares @ torch.cat(self._values, dim=2)).transpose(1, 2).flatten(2)
        middle_BTH = residual_BTH + attention.o_proj(attended_BTQ)
        return middle_BTH + self.module.mlp(self.module.post_attention_layernorm(middle_BTH))

    def _visible(self, step: int) -> Tensor:
        """[B, 1, T, T * steps so far]"""
        window = self._draft.config.sliding_window or 10**9
        length = self._chat_BTT.shape[1]
        distance_TT = torch.arange(length)[:, None] - torch.arange(length)
        causal_BTT = self._chat_BTT & (distance_TT >= 0) & (distance_TT + step < window)
        own_BTT = torch.eye(length, dtype=torch.bool).expand_as(causal_BTT)
        own = [own_BTT & (step - later < window) for later in range(1, step + 1)]
        return torch.cat((causal_BTT, *own), dim=-1).unsqueeze(1)
