"""A transformers causal language model as an EAGLE-3 target.

Legend: B batch, T sequence, H target hidden, V target vocab, K draft vocab, N rows.
"""

import sys
import threading
import uuid
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eagle_rpc.config.choices import CompileMode
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.sizes.target import aux_layers
from eagle_rpc.supervision import (
    DraftHead,
    Eagle3Target,
    ModelInfo,
    StageInfo,
    StageOutput,
    TargetOutput,
    TargetShape,
    TokenBatch,
    form_of_pass,
    fused_rows_run,
    read_rows,
    read_rows_fused,
    to_device,
    tokenizer_fingerprint,
    weight_samples,
    weights_fingerprint,
)
from eagle_rpc.target.capture import (
    AuxStates,
    captured_layers,
    check_capture,
    find_base,
    find_decoder,
    find_decoder_layers,
    run_base,
)
from eagle_rpc.target.chat_attention import ChatAttention, positions_within_chats
from eagle_rpc.target.compiled import Buckets, CompiledForward
from eagle_rpc.target.fused_mlps import FusedMLPs
from eagle_rpc.target.lm_head import OwnHead, check_own_head, draft_head, probe_draft_head
from eagle_rpc.target.loading import caps_attention, load_spread
from eagle_rpc.target.probes import check_causal, check_embedding, check_packing, refusing_failures
from eagle_rpc.target.spread import Spread
from eagle_rpc.target.stage import Stage

# Tokens of the forward pass that the probes run.
_PROBE_TOKENS = 32


class HFEagle3TargetModel(Eagle3Target):
    """One frozen decoder, three of its layers and its head.

    Safe to call from several threads: forward passes run one at a time.
    """

    takes_host_tokens = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        aux_layer_ids: Sequence[int] | None = None,
        fused_rows: bool = True,
        fused_mlp: bool = True,
        spread: Spread | None = None,
        stage: Stage | None = None,
    ) -> None:
        """Not compiled; see `compile`. `fused_rows` and `fused_mlp` as in `TargetConfig`.

        `spread` of a model on several devices; null: it is on one. `stage`: what of it runs here; null: all.
        Raises `ConfigError` for bad `aux_layer_ids`, `UnsupportedTarget` if supervision would not be exact.
        """
        name = type(model).__name__
        if caps_attention(model.config) and model.config._attn_implementation == "sdpa":
            raise UnsupportedTarget(
                f"{name} soft-caps attention scores and sdpa does not; use target.attention=eager"
            )
        self.model = model.eval().requires_grad_(False)
        """The transformers model, for other uses while no batch runs. Its weights must not change."""
        self._shape = TargetShape.of(model.config)
        self._base = find_base(model)
        self._layers = find_decoder_layers(model)
        self.tokenizer = tokenizer
        self.aux_layer_ids = aux_layers(len(self._layers), aux_layer_ids)
        self._spread, self._stage = spread, stage
        numbers = range(len(self._layers)) if stage is None else stage.layers
        self._own_layers = [self._layers[number] for number in numbers]
        # Places among all captured layers of those that run here.
        self._captured = [place for place, layer in enumerate(self.aux_layer_ids) if layer in numbers]
        own_aux = [self.aux_layer_ids[place] for place in self._captured]
        here = next(self._own_layers[0].parameters()).device
        self.devices = (here,) if spread is None else spread.devices
        self._forward_lock = threading.Lock()
        self._packing_is_exact = False
        self._compiled: CompiledForward | None = None
        runs = refusing_failures(f"{name} must run on token ids alone")
        with self._forward_lock, torch.inference_mode(), runs:
            check_causal(partial(run_base, self._base), self._probe_ids, name)
            output = check_capture(self._base, self._layers, own_aux, self._probe_ids)
            hidden_BTH = output[0]
            check_embedding(self.get_input_embeddings().weight, hidden_BTH.shape[-1], name)
            self._own_head, self._fused_rows = None, False
            if stage is None or stage.is_last:
                self._own_head = OwnHead(model, type(output))
                check_own_head(self._own_head, model, self._probe_ids, hidden_BTH)
                logits_NV = self._own_head.project(hidden_BTH.flatten(0, 1))
                self._fused_rows = fused_rows and fused_rows_run(logits_NV)
            self._attention = ChatAttention(self._base, find_decoder(model), self._probe_ids, self.devices)
        modules = (module for layer in self._own_layers for module in layer.modules())
        self._mlps = FusedMLPs(modules if fused_mlp else ())

    @classmethod
    def load(
        cls,
        config: TargetConfig,
        *devices: torch.device | str,
        cache_dir: str | Path,
        seed: int = 0,
        stage: tuple[int, int] = (0, 1),
    ) -> "HFEagle3TargetModel":
        """The target of the configuration on one device, or over several, in the order of its layers.

        `stage` and errors as in `load_spread`, errors also as in the constructor.
        """
        places = [torch.device(device) for device in devices]
        loaded = load_spread(config, places, cache_dir=cache_dir, seed=seed, stage=stage)
        target = cls(
            loaded.model,
            tokenizer=loaded.tokenizer,
            aux_layer_ids=config.aux_layer_ids,
            fused_rows=config.fused_rows,
            fused_mlp=config.fused_mlp,
            spread=loaded.spread,
            stage=loaded.stage,
        )
        if config.compile_shapes:
            target.compile(config.compile_shapes, packed=config.compile_packed, mode=config.compile_mode)
        return target

    def compile(self, shapes: Sequence[str], *, packed: bool, mode: CompileMode) -> None:
        """Compiles the decoder layers; from now on batches are cut and padded to `shapes` (`BxT`).

        Call it before `model_info`, which describes it. Without `packed`, rows of several chats are refused.
        Raises `UnsupportedTarget` for layers that do not compile.
        """
        compiled = CompiledForward(
            self._attention, self._own_layers, Buckets(shapes), packed=packed, mode=mode.value
        )
        with self._forward_lock, self._mlps.in_place():
            compiled.compile(self.devices)
            self._compiled = compiled

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding [V, H], without the factor that Gemma 2 applies in its forward."""
        return self.model.get_input_embeddings()

    @torch.no_grad()
    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> TargetOutput:
        """Runs the decoder once on [B, T] ids, padded on the right. Ids on the CPU make no wait for the GPU.

        With `segment_ids` the chats of a row do not see each other, and positions restart at each. Raises
        `UnsupportedTarget` if this model cannot run packed rows exactly.
        """
        with self._forward_lock:
            if segment_ids is not None:
                self._check_packing()
            aux, last_hidden_BTH = self._forward(input_ids, attention_mask, segment_ids)
        return self._output(aux.states, last_hidden_BTH)

    @torch.no_grad()
    def run_stage(self, tokens: TokenBatch, incoming: Sequence[Tensor] | None) -> StageOutput:
        """See `StageTarget`. Raises as `generate_batch`."""
        assert self._stage is not None, "a whole target has no stages"
        with self._forward_lock:
            if tokens.segment_ids is not None:
                self._check_packing()
            with self._stage.crossing(incoming) as handed_on:
                masks = tokens.attention_mask, tokens.segment_ids
                aux, last_hidden_BTH = self._forward(tokens.input_ids, *masks)
        states = aux.states if self._captured else last_hidden_BTH[..., :0]
        output = self._output(states, last_hidden_BTH) if self._stage.is_last else None
        return StageOutput(aux_hidden_states=states, handed_on=handed_on, output=output)

    def _forward(
        self, input_ids: Tensor, attention_mask: Tensor, segment_ids: Tensor | None
    ) -> tuple[AuxStates, Tensor]:
        """What captured layers gave, and last hidden states [B, T, H]."""
        positions_BT = None
        if segment_ids is not None:
            positions_BT = positions_within_chats(attention_mask.bool(), segment_ids).cpu()
        input_ids = to_device(input_ids, self.devices[0])
        bring = None if self._spread is None else self._spread.to_last
        aux = AuxStates(input_ids.shape, len(self._captured), bring)
        layers = [self.aux_layer_ids[place] for place in self._captured]
        captured = captured_layers(self._layers, layers, aux.write)
        with captured, self._mlps.in_place(), torch.inference_mode():
            if self._compiled is not None:
                return aux, self._compiled.run(input_ids, positions_BT, aux)
            return aux, self._attention.run(input_ids, positions_BT, compiled=False)

    def _output(self, aux_BTW: Tensor, last_hidden_BTH: Tensor) -> TargetOutput:
        return TargetOutput(
            aux_hidden_states=aux_BTW,
            last_hidden_state=last_hidden_BTH,
            project=self._head().project,
            read_rows=read_rows_fused if self._fused_rows else read_rows,
        )

    def _head(self) -> OwnHead:
        assert self._own_head is not None, "the last stage has the head"
        return self._own_head

    def draft_head(self, selected_token_ids: Tensor) -> DraftHead:
        """Copies of the head's rows for K target ids; raises `UnsupportedTarget` if it has no such form."""
        return draft_head(self.model, selected_token_ids)

    @torch.inference_mode()
    def probe_head(self, selected_token_ids: Tensor) -> None:
        """Raises `UnsupportedTarget` unless `draft_head` computes the same as the model's own head."""
        with self._forward_lock:
            hidden_NH = run_base(self._base, self._probe_ids).flatten(0, 1)
        probe_draft_head(self.draft_head(selected_token_ids), self._head(), selected_token_ids, hidden_NH)

    @cached_property
    def _probe_ids(self) -> Tensor:
        embedding = self.get_input_embeddings().weight
        spread = torch.linspace(0, embedding.shape[0] - 1, _PROBE_TOKENS, device=self.devices[0])
        return spread.long().unsqueeze(0)

    def _check_packing(self) -> None:
        """At the first packed batch: rows of two chats must give what the chats give alone."""
        if self._packing_is_exact:
            return

        def run(ids_BT: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
            return self._forward(ids_BT, torch.ones_like(ids_BT), segment_ids_BT)[1]

        chats_BT = self._probe_ids.view(2, -1)[:, : self._max_length]
        check_packing(run, chats_BT, self.model, find_decoder(self.model))
        self._packing_is_exact = True

    @property
    def _max_length(self) -> int:
        """Tokens of the model's context; without one the largest number, so that the settings decide."""
        context = self._shape.context or sys.maxsize
        return context if self._compiled is None else min(context, self._compiled.buckets.longest)

    def stage_info(self) -> StageInfo:
        """See `StageTarget`."""
        assert self._stage is not None, "a whole target has no stages"
        return StageInfo(
            number=self._stage.number,
            count=self._stage.count,
            captured=tuple(self._captured),
            attention=self._form_of_layers,
            fused_rows=self._fused_rows,
            num_fused_mlps=len(self._mlps),
            weights=weight_samples(self.model, self._stage.owns),
        )

    @property
    def _form_of_layers(self) -> str:
        run = "eager" if self._compiled is None else self._compiled.form
        return f"{self.model.config._attn_implementation} attention, {run}"

    def model_info(self) -> ModelInfo:
        """Identity of the target; its limits are the model's own context. Of a stage without what others know."""
        return self._info

    @cached_property
    def _info(self) -> ModelInfo:
        return ModelInfo(
            architecture=type(self.model).__name__,
            vocab_size=self.get_input_embeddings().weight.shape[0],
            hidden_size=self._shape.hidden_size,
            num_layers=len(self._layers),
            aux_layer_ids=self.aux_layer_ids,
            dtype=str(self.model.dtype).removeprefix("torch."),
            max_length=self._max_length,
            max_batch_tokens=self._max_length,
            tokenizer_fingerprint=None if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer),
            weights_fingerprint="" if self._stage is not None else weights_fingerprint(self.model),
            incarnation=uuid.uuid4().hex,
            form=form_of_pass(self._form_of_layers, fused_rows=self._fused_rows, fused_mlps=len(self._mlps)),
        )
