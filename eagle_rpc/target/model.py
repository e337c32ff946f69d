"""A transformers causal language model as an EAGLE-3 target.

Legend: B batch, T sequence, H target hidden, V target vocab, K draft vocab, N rows.
"""

import threading
import uuid
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.supervision import DraftHead, ModelInfo, TargetOutput, tokenizer_fingerprint, weights_fingerprint
from eagle_rpc.target.capture import aux_layers, captured_layers, find_base, find_decoder_layers
from eagle_rpc.target.head import ROUNDING, OwnHead, check_own_head, draft_head, probe_draft_head, relative_error
from eagle_rpc.target.loading import caps_attention, load_model
from eagle_rpc.target.packed_attention import attention_by_chat

# Tokens of the forward that the head is probed on.
_PROBE_TOKENS = 32


class HFEagle3TargetModel:
    """One frozen decoder, three of its layers and its head.

    Safe to call from several threads: forward passes run one at a time.
    """

    def __init__(self, model: PreTrainedModel, *, tokenizer: Any | None = None, aux_layer_ids: Sequence[int] | None = None):
        """Raises `ConfigError` for bad `aux_layer_ids`, `UnsupportedTarget` for a model whose supervision would not be exact."""
        if caps_attention(model.config) and model.config._attn_implementation == "sdpa":
            raise UnsupportedTarget(
                f"{type(model).__name__} soft-caps attention scores and sdpa does not; use target.attention=eager"
            )
        self._model = model.eval().requires_grad_(False)
        self._base = find_base(model)
        self._layers = find_decoder_layers(model)
        self._tokenizer = tokenizer
        self.aux_layer_ids = aux_layers(len(self._layers), aux_layer_ids)
        self._own_head = OwnHead(model)
        self._forward_lock = threading.Lock()
        self._packing_is_exact = False
        with self._forward_lock, torch.inference_mode():
            check_own_head(self._own_head, model, self._probe_ids, self._base(input_ids=self._probe_ids, use_cache=False)[0])

    @classmethod
    def load(
        cls, config: TargetConfig, device: torch.device | str, *, cache_dir: str | Path, seed: int = 0
    ) -> "HFEagle3TargetModel":
        """The target that the configuration describes; errors as of `load_model` and the constructor."""
        model, tokenizer = load_model(config, device, cache_dir=cache_dir, seed=seed)
        return cls(model, tokenizer=tokenizer, aux_layer_ids=config.aux_layer_ids)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model, for generation and evaluation beside the service."""
        return self._model

    @property
    def tokenizer(self) -> Any | None:
        return self._tokenizer

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding; its weight [V, H] is raw, without the factor that Gemma 2 multiplies by in its forward."""
        return self._model.get_input_embeddings()

    @torch.no_grad()
    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> TargetOutput:
        """Runs the decoder once on [B, T] ids, padded on the right, without its head.

        With `segment_ids` the chats of a row see only themselves and positions restart at each. Raises
        `UnsupportedTarget` if this model cannot run packed rows exactly.
        """
        with self._forward_lock:
            if segment_ids is not None:
                self._check_packing()
            return self._forward(input_ids, attention_mask, segment_ids)

    def _forward(self, input_ids: Tensor, attention_mask: Tensor, segment_ids: Tensor | None) -> TargetOutput:
        if segment_ids is None:
            positions_BT, visibility = None, {"attention_mask": attention_mask.bool()}
        else:
            # Without a mask, transformers reads from positions that restart where one sequence ends and the next begins.
            positions_BT = _packed_positions(attention_mask.bool(), segment_ids)
            visibility = {"position_ids": positions_BT}
        with (
            captured_layers(self._layers, self.aux_layer_ids) as captured,
            torch.inference_mode(),
            attention_by_chat(self._base, positions_BT),
        ):
            last_hidden_BTH = self._base(input_ids=input_ids, use_cache=False, **visibility)[0]
        # Outside inference mode, so that autograd may save what comes of it.
        aux_BT3H = torch.cat([captured[layer] for layer in self.aux_layer_ids], dim=-1)
        return TargetOutput(aux_hidden_states=aux_BT3H, last_hidden_state=last_hidden_BTH, project=self._own_head.project)

    def draft_head(self, selected_token_ids: Tensor) -> DraftHead:
        """The head's rows for K target ids, in tensors of their own; raises `UnsupportedTarget` if there is no such form."""
        return draft_head(self._model, selected_token_ids)

    @torch.inference_mode()
    def probe_head(self, selected_token_ids: Tensor) -> None:
        """Raises `UnsupportedTarget` unless `draft_head` computes what the model's own head does."""
        with self._forward_lock:
            hidden_NH = self._base(input_ids=self._probe_ids, use_cache=False)[0].flatten(0, 1)
        probe_draft_head(self.draft_head(selected_token_ids), self._own_head, selected_token_ids, hidden_NH)

    @cached_property
    def _probe_ids(self) -> Tensor:
        embedding = self.get_input_embeddings().weight
        spread = torch.linspace(0, embedding.shape[0] - 1, _PROBE_TOKENS, device=embedding.device)
        return spread.long().unsqueeze(0)

    def _check_packing(self) -> None:
        """Once: two rows of two chats must give what the chats give alone."""
        if self._packing_is_exact:
            return
        ids_BT = self._probe_ids.view(2, -1)
        whole = torch.ones_like(ids_BT, dtype=torch.bool)
        middle = ids_BT.shape[1] // 2
        packed = self._forward(
            ids_BT, whole, (torch.arange(ids_BT.shape[1], device=ids_BT.device) >= middle).long().expand_as(ids_BT)
        )
        for chat in (slice(0, middle), slice(middle, None)):
            alone = self._forward(ids_BT[:, chat], whole[:, chat], None)
            error = relative_error(packed.last_hidden_state[:, chat], alone.last_hidden_state)
            if not error <= ROUNDING[alone.last_hidden_state.dtype]:
                raise UnsupportedTarget(
                    f"{type(self._model).__name__} with {self._model.config._attn_implementation} attention does not keep packed "
                    f"chats apart (relative error {error:.1e}); send one chat a row"
                )
        self._packing_is_exact = True

    def model_info(self) -> ModelInfo:
        """Identity of the target; its limits are the model's own context."""
        return self._info

    @cached_property
    def _info(self) -> ModelInfo:
        weight_VH = self.get_input_embeddings().weight
        context = self._model.config.get_text_config().max_position_embeddings
        return ModelInfo(
            architecture=type(self._model).__name__,
            vocab_size=weight_VH.shape[0],
            hidden_size=self._model.config.get_text_config().hidden_size,
            num_layers=len(self._layers),
            aux_layer_ids=self.aux_layer_ids,
            dtype=str(self._model.dtype).removeprefix("torch."),
            max_length=context,
            max_batch_tokens=context,
            tokenizer_fingerprint=None if self._tokenizer is None else tokenizer_fingerprint(self._tokenizer),
            weights_fingerprint=weights_fingerprint(self._model),
            incarnation=uuid.uuid4().hex,
        )


def _packed_positions(real_BT: Tensor, segment_ids_BT: Tensor) -> Tensor:
    """Positions [B, T] that restart at each segment, and at the padding after the last one."""
    index_BT = torch.arange(real_BT.shape[1], device=real_BT.device).expand_as(real_BT)
    starts_BT = torch.zeros_like(real_BT)
    starts_BT[:, 1:] = (segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]) | (real_BT[:, 1:] != real_BT[:, :-1])
    return index_BT - (index_BT * starts_BT).cummax(dim=1).values
