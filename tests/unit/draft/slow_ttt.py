"""The whole of TTT again, one slot and one key at a time in float64: what the product is checked against.

It takes unpadded chats, not batches, and shares nothing with the product but weights and names.
"""

import math

import torch
from torch import Tensor

from eagle_rpc.draft import Eagle3Draft


def slow_ttt(
    draft: Eagle3Draft, chats: list[dict[str, Tensor]], steps: int, decay: float
) -> dict[str, Tensor]:
    """Loss (with gradient), cross entropies' sums, rows and correct guesses of each step, denominators their
    own counts.
    """
    weights = dict(draft.named_parameters())
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(steps)]
    rows, correct = [0] * steps, [0] * steps
    for chat in chats:
        outputs = _outputs(draft, weights, chat, steps)
        probs = {int(row): chat["probs"][i].double() for i, row in enumerate(chat["rows"])}
        for (step, slot), output in outputs.items():
            if slot + step in probs:
                p = probs[slot + step]
                logits = weights["lm_head.weight"] @ _norm(
                    output, weights["norm.weight"], draft.config.rms_norm_eps
                )
                sums[step] = sums[step] - (p * logits.log_softmax(0)).sum()
                rows[step] += 1
                correct[step] += int(logits.argmax() == p.argmax())
    shares = [decay**step / sum(decay**other for other in range(steps)) for step in range(steps)]
    loss = sum(share * total / max(1, count) for share, total, count in zip(shares, sums, rows, strict=True))
    return {
        "loss": loss,
        "sums": torch.stack(sums).detach(),
        "rows": torch.tensor(rows),
        "correct": torch.tensor(correct),
    }


def _outputs(draft: Eagle3Draft, weights: dict[str, Tensor], chat: dict[str, Tensor], steps: int) -> dict:
    """Output of every (step, slot) whose next token exists."""
    config, ids, memories = draft.config, chat["ids"], [({}, {}) for _ in range(draft.config.num_layers)]
    eps, outputs = config.rms_norm_eps, {}
    for step in range(steps):
        for slot in range(len(ids) - step - 1):
            hidden = outputs[step - 1, slot] if step else _fused(draft, weights, chat["aux"][slot])
            if step and config.norm_output:
                hidden = _norm(hidden, weights["norm.weight"], eps)
            embedding = weights["embed_tokens.weight"][ids[slot + step + 1]]
            normed = _norm(hidden, weights["midlayer.hidden_norm.weight"], eps)
            x = torch.cat([_norm(embedding, weights["midlayer.input_layernorm.weight"], eps), normed])
            residual = normed if config.norm_before_residual else hidden
            hidden = _layer(draft, weights, "midlayer", x, residual, (step, slot), memories[0])
            for number in range(1, config.num_layers):
                x = _norm(hidden, weights[f"layers.{number}.input_layernorm.weight"], eps)
                hidden = _layer(draft, weights, f"layers.{number}", x, hidden, (step, slot), memories[number])
            outputs[step, slot] = hidden
    return outputs


def _layer(
    draft: Eagle3Draft,
    weights: dict[str, Tensor],
    name: str,
    x: Tensor,
    residual: Tensor,
    place: tuple[int, int],
    memory: tuple[dict, dict],
) -> Tensor:
    """The output of a layer for its normed input `x` at (step, slot); keys and values are kept in `memory`."""
    config, (step, slot), (keys, values) = draft.config, place, memory
    q, k, v = (
        (weights[f"{name}.self_attn.{one}_proj.weight"] @ x).reshape(-1, config.head_dim)
        for one in ("q", "k", "v")
    )
    position = slot + step
    q, k = _turn(q, position, config.rope_theta), _turn(k, position, config.rope_theta)
    keys[place], values[place] = k, v
    seen = [(0, earlier) for earlier in range(slot + 1)] + [(later, slot) for later in range(1, step + 1)]
    if config.sliding_window is not None:
        seen = [(s, t) for s, t in seen if s + t > position - config.sliding_window]
    attended = []
    for head in range(config.num_attention_heads):
        shared = head // (config.num_attention_heads // config.num_key_value_heads)
        scores = torch.stack([q[head] @ keys[one][shared] / math.sqrt(config.head_dim) for one in seen])
        shares = scores.exp() / scores.exp().sum()
        attended.append(sum(share * values[one][shared] for share, one in zip(shares, seen, strict=True)))
    middle = residual + weights[f"{name}.self_attn.o_proj.weight"] @ torch.cat(attended)
    y = _norm(middle, weights[f"{name}.post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = weights[f"{name}.mlp.gate_proj.weight"] @ y, weights[f"{name}.mlp.up_proj.weight"] @ y
    return middle + weights[f"{name}.mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)


def _fused(draft: Eagle3Draft, weights: dict[str, Tensor], aux: Tensor) -> Tensor:
    """The first input of the draft from the captured states of one token."""
    config = draft.config
    if config.norm_before_fc:
        aux = _norm(aux, weights["input_norm.weight"], config.rms_norm_eps)
    if config.fc_norm:
        states = aux.split(config.hidden_size)
        normed = [
            _norm(state, weights[f"fc_norm.{place}.weight"], config.rms_norm_eps)
            for place, state in enumerate(states)
        ]
        aux = torch.cat(normed)
    return weights["fc.weight"] @ aux


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / ((x * x).sum() / len(x) + eps).sqrt()


def _turn(heads: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding as a rotation of complex numbers (first half real, second half imaginary)."""
    half = heads.shape[-1] // 2
    angles = position / theta ** (torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(heads[:, :half], heads[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
