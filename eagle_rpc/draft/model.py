"""The EAGLE-3 draft (arXiv 2503.01840): Llama layers over token embeddings and hidden states.

The norms before `fc` and after each step are those of EAGLE-3.1 (arXiv 2605.09992), as vLLM computes them.
Parameters have the names of the exported checkpoint.
Legend: B batch, T sequence, L slots with an output, S new tokens, H hidden, W width of all captured states side
by side, K draft vocab, D head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle_rpc.draft.attention_memory import AttentionMemory, DraftCache, DraftMemory, UnrollMemory
from eagle_rpc.draft.live_slots import LiveSlots
from eagle_rpc.draft.rope import RopeTables, rotary_embedding, rotate
from eagle_rpc.errors import ConfigError
from eagle_rpc.sizes.draft import Eagle3DraftConfig

INITIAL_STD = 0.02


class RMSNorm(nn.Module):
    """`weight * x / rms(x)`, computed in fp32 (fp64 for fp64 inputs) and returned in the dtype of `x`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * scaled.to(x.dtype)


class DraftAttention(nn.Module):
    """Grouped-query attention over inputs of `input_width`."""

    def __init__(self, config: Eagle3DraftConfig, input_width: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(input_width, query_width, bias=False)
        self.k_proj = nn.Linear(input_width, key_width, bias=False)
        self.v_proj = nn.Linear(input_width, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(self, inputs_BT: Tensor, tables: RopeTables, memory: AttentionMemory) -> Tensor:
        queries = self._heads(self.q_proj(memory.asking(inputs_BT)))
        keys, values = self._heads(self.k_proj(inputs_BT)), self._heads(self.v_proj(inputs_BT))
        cos, sin = tables
        queries = rotate(queries, (memory.asking(cos), memory.asking(sin)))
        attended = memory.attend(queries, rotate(keys, tables), values)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, wide: Tensor) -> Tensor:
        """[B, heads, T, D]"""
        return wide.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class DraftMLP(nn.Module):
    """Llama's gated feed-forward block."""

    def __init__(self, config: Eagle3DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTH)) * self.up_proj(x_BTH))


class DraftLayer(nn.Module):
    """The first layer, which reads embeddings beside hidden states.

    `norm_before_residual`: the residual is the normed hidden state.
    """

    def __init__(self, config: Eagle3DraftConfig) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DraftAttention(config, 2 * config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DraftMLP(config)

    def forward(
        self, embeds_BTH: Tensor, hidden_BTH: Tensor, tables: RopeTables, memory: AttentionMemory
    ) -> Tensor:
        normed_BTH = self.hidden_norm(hidden_BTH)
        residual_BTH = normed_BTH if self.norm_before_residual else hidden_BTH
        inputs_BT2H = torch.cat((self.input_layernorm(embeds_BTH), normed_BTH), dim=-1)
        residual_BLH = memory.asking(residual_BTH)
        hidden_BLH = residual_BLH + self.self_attn(inputs_BT2H, tables, memory)
        return hidden_BLH + self.mlp(self.post_attention_layernorm(hidden_BLH))


class FurtherLayer(nn.Module):
    """A layer after the first: Llama's own."""

    def __init__(self, config: Eagle3DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DraftAttention(config, config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DraftMLP(config)

    def forward(self, hidden_BTH: Tensor, tables: RopeTables, memory: AttentionMemory) -> Tensor:
        residual_BLH = memory.asking(hidden_BTH)
        hidden_BLH = residual_BLH + self.self_attn(self.input_layernorm(hidden_BTH), tables, memory)
        return hidden_BLH + self.mlp(self.post_attention_layernorm(hidden_BLH))


class Eagle3Draft(nn.Module):
    """The draft as serving engines compute it. Call `initialise`, or load a state dict, before use.

    `input_embeddings` [V, H] is the target's token embedding, which the draft reads and never writes, in its dtype
    and without a copy (`train_embeddings` makes a trained one). Raises `ConfigError` if its shape differs from the
    config's.
    """

    def __init__(self, config: Eagle3DraftConfig, input_embeddings: Tensor) -> None:
        super().__init__()
        expected = (config.vocab_size, config.hidden_size)
        if tuple(input_embeddings.shape) != expected:
            raise ConfigError(
                f"input_embeddings must have shape {list(expected)}, got {list(input_embeddings.shape)}"
            )
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(input_embeddings.detach(), freeze=True)
        width = config.num_aux_layers * config.hidden_size
        self.aux_norms: list[list[RMSNorm]] = []
        """Norms before `fc`, one stage after the other; those of a stage share the captured states evenly."""
        if config.norm_before_fc:
            self.input_norm = RMSNorm(width, config.rms_norm_eps)
            self.aux_norms.append([self.input_norm])
        if config.fc_norm:
            norms = [RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(config.num_aux_layers)]
            self.fc_norm = nn.ModuleList(norms)
            self.aux_norms.append(norms)
        self.fc = nn.Linear(width, config.hidden_size, bias=False)
        self.midlayer = DraftLayer(config)
        # Named by their numbers; the first layer has a name of its own.
        self.layers = nn.ModuleDict({str(n): FurtherLayer(config) for n in range(1, config.num_layers)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary = rotary_embedding(config)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draws all trainable weights: equal seeds give equal weights on every trainer and device."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                drawn = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(drawn.normal_(std=INITIAL_STD, generator=generator))

    def train_embeddings(self) -> None:
        """Makes a copy of the embedding a trained parameter, at least fp32; `initialise` comes before."""
        weight_VH = self.embed_tokens.weight.detach()
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        self.embed_tokens.weight = nn.Parameter(weight_VH.to(wide, copy=True))

    @torch.no_grad()
    def seed_lm_head(self, weight_KH: Tensor) -> None:
        """Starts with the target's head, its rows of the draft vocabulary [K, H]."""
        if weight_KH.shape != self.lm_head.weight.shape:
            raise ConfigError(
                f"weight_KH must have shape {list(self.lm_head.weight.shape)}, got {list(weight_KH.shape)}"
            )
        self.lm_head.weight.copy_(weight_KH)

    def fuse(self, aux_BTW: Tensor) -> Tensor:
        """Projects the captured states of the target, of any floating dtype, to one [B, T, H]."""
        if not torch.is_autocast_enabled(aux_BTW.device.type):
            aux_BTW = aux_BTW.to(self.fc.weight.dtype)
        for norms in self.aux_norms:
            parts = zip(norms, aux_BTW.chunk(len(norms), dim=-1), strict=True)
            aux_BTW = torch.cat([norm(part) for norm, part in parts], dim=-1)
        return self.fc(aux_BTW)

    def advance(
        self, ids_BT: Tensor, hidden_BTH: Tensor, positions_BT: Tensor, memory: DraftMemory
    ) -> Tensor:
        """One pass; returns the output before the norm [B, L, H], of which `carried` makes the next step's input.

        Slot t pairs the hidden state of token t with the id of token t + 1. Positions are [B or 1, T]. All
        slots give keys and values; outputs are those of the slots that `memory` lets ask.
        """
        embeds_BTH = self.embed_tokens(ids_BT).to(hidden_BTH.dtype)
        tables = self.rotary.tables(positions_BT)
        first, *further = memory.layers
        hidden = self.midlayer(embeds_BTH, hidden_BTH, tables, first)
        for layer, layer_memory in zip(self.layers.values(), further, strict=True):
            hidden = layer(hidden, tables, layer_memory)
        return hidden

    def new_cache(self) -> DraftCache:
        """An empty cache for decoding."""
        return DraftCache(self.config.num_layers, self.config.sliding_window)

    def unroll_memory(self, live: LiveSlots) -> UnrollMemory:
        """The memory of one batch in training."""
        return UnrollMemory(live, self.config.num_layers, self.config.sliding_window)

    def carried(self, output_BLH: Tensor) -> Tensor:
        """The hidden states that the next step reads, from this step's output before the norm."""
        return self.norm(output_BLH) if self.config.norm_output else output_BLH

    def decode_step(self, ids_BS: Tensor, hidden_BSH: Tensor, cache: DraftCache) -> tuple[Tensor, Tensor]:
        """Appends S slots; returns what the next step reads of them [B, S, H] and the last one's logits [B, K].

        First pass the fused hidden states of the target's tokens, then one guess at a time with what the last
        step returned. Before the next round truncate the cache to the slots of verified tokens.
        """
        positions_1S = torch.arange(cache.length, cache.length + ids_BS.shape[1], device=ids_BS.device)[None]
        output_BSH = self.advance(ids_BS, hidden_BSH, positions_1S, cache)
        return self.carried(output_BSH), self.lm_head(self.norm(output_BSH[:, -1]))
