"""A model in vLLM's engine as an EAGLE-3 target.

Legend: B batch, T sequence, W width of all captured states, H target hidden, V target vocab, K draft vocab, N rows.
"""

import uuid
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.sizes.target import aux_layers
from eagle_rpc.supervision import (
    DraftHead,
    Eagle3Target,
    ModelInfo,
    TargetOutput,
    TargetShape,
    fused_rows_run,
    read_rows,
    read_rows_fused,
    tokenizer_fingerprint,
)
from eagle_rpc.supervision.segments import chat_starts
from eagle_rpc.target.beside_decoder import StoredTensors, load_beside_decoder
from eagle_rpc.target.directory import resolve_model_dir
from eagle_rpc.target.engine_check import load_reference
from eagle_rpc.target.lm_head import OwnHead, draft_head, probe_draft_head
from eagle_rpc.target.model_files import load_target_config, load_tokenizer
from eagle_rpc.target.vllm_engine import EngineModel, HiddenStates, require_vllm

# Tokens of the pass that the head is probed with.
_PROBE_TOKENS = 32


class VLLMEagle3TargetModel(Eagle3Target):
    """An engine for the decoder; the head and the token embedding are this process's own.

    Chats of a packed row are prompts of their own, so they never see each other, and padding costs nothing.
    One thread at a time may call it.
    """

    takes_host_tokens = True

    def __init__(self, config: TargetConfig, *devices: torch.device | str, cache_dir: str | Path) -> None:
        """Loads the model over `devices`; supervision leaves from the last one.

        Raises `ConfigError` if vLLM is not installed or cannot run the model with these settings, also for
        another number of devices than these name; `UnsupportedTarget` if its states are not those of
        transformers; with `target.vllm.check` also the errors of `HFEagle3TargetModel.load`.
        """
        require_vllm()
        self.devices = tuple(torch.device(device) for device in devices)
        _require_devices(config, self.devices)
        hf_config = load_target_config(config, cache_dir=cache_dir)
        directory = resolve_model_dir(config, cache_dir)
        self._shape = TargetShape.of(hf_config)
        self._dtype, self._max_length = config.dtype.value, _longest(config, self._shape)
        self.aux_layer_ids = aux_layers(self._shape.num_layers, config.aux_layer_ids)
        self.tokenizer = load_tokenizer(config, cache_dir=cache_dir)
        stored = StoredTensors(directory)
        self._fingerprint = stored.fingerprint()
        reference = None
        if config.vllm.check:
            reference = load_reference(
                config,
                self.devices,
                self.aux_layer_ids,
                fingerprint=self._fingerprint,
                cache_dir=Path(cache_dir),
            )
        self._model = load_beside_decoder(config, hf_config, stored, self.devices[-1])
        self._own_head = OwnHead(self._model, BaseModelOutputWithPast)
        self._engine = HiddenStates(
            config,
            EngineModel(
                directory=directory,
                architecture=type(self._model).__name__,
                aux_layer_ids=self.aux_layer_ids,
                max_length=self._max_length,
            ),
            self.devices,
        )
        if reference is not None:
            (states,) = self._engine.of_prompts([reference.ids.tolist()])
            reference.check_states(states, self._engine.name)
            with torch.inference_mode():
                reference.check_head(self._own_head.project(reference.last_hidden.to(self.devices[-1])))
        self._checked = reference is not None
        self._fused_rows = config.fused_rows and fused_rows_run(self._own_head.project(self._probe_hidden))

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding [V, H], read from the model's files."""
        embedding = self._model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding

    @torch.no_grad()
    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> TargetOutput:
        """Asks the engine for the chats of [B, T] ids, padded on the right. States at padding are zero.

        Raises `TargetLost` if the engine has failed.
        """
        chats = list(chats_of(attention_mask.cpu(), None if segment_ids is None else segment_ids.cpu()))
        ids = input_ids.tolist()
        states = self._engine.of_prompts([ids[row][chat] for row, chat in chats])
        batch, length = input_ids.shape
        hidden_size = self._shape.hidden_size
        like = states[0]
        aux_BTW = torch.zeros(
            batch, length, like.shape[-1] - hidden_size, dtype=like.dtype, device=self.devices[-1]
        )
        last_BTH = aux_BTW.new_zeros(batch, length, hidden_size)
        for (row, chat), state in zip(chats, states, strict=True):
            state = state.to(self.devices[-1])
            aux_BTW[row, chat] = state[:, :-hidden_size]
            last_BTH[row, chat] = state[:, -hidden_size:]
        return TargetOutput(
            aux_hidden_states=aux_BTW,
            last_hidden_state=last_BTH,
            project=self._own_head.project,
            read_rows=read_rows_fused if self._fused_rows else read_rows,
        )

    def draft_head(self, selected_token_ids: Tensor) -> DraftHead:
        """Copies of the head's rows for K target ids; raises `UnsupportedTarget` if it has no such form."""
        return draft_head(self._model, selected_token_ids)

    @torch.inference_mode()
    def probe_head(self, selected_token_ids: Tensor) -> None:
        """Raises `UnsupportedTarget` unless `draft_head` computes the same as the model's own head."""
        rebuilt = self.draft_head(selected_token_ids)
        probe_draft_head(rebuilt, self._own_head, selected_token_ids, self._probe_hidden)

    @cached_property
    def _probe_hidden(self) -> Tensor:
        """[N, H]: last hidden states of a few tokens."""
        ids = torch.linspace(0, self._shape.vocab_size - 1, min(_PROBE_TOKENS, self._max_length)).long()
        (states,) = self._engine.of_prompts([ids.tolist()])
        return states[:, -self._shape.hidden_size :].to(self.devices[-1])

    def model_info(self) -> ModelInfo:
        """Identity of the target; its longest sequence is the engine's."""
        return ModelInfo(
            architecture=type(self._model).__name__,
            vocab_size=self.get_input_embeddings().weight.shape[0],
            hidden_size=self._shape.hidden_size,
            num_layers=self._shape.num_layers,
            aux_layer_ids=self.aux_layer_ids,
            dtype=self._dtype,
            max_length=self._max_length,
            max_batch_tokens=self._max_length,
            tokenizer_fingerprint=None if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer),
            weights_fingerprint=self._fingerprint,
            incarnation=uuid.uuid4().hex,
            # Not bit for bit: the engine forms its own batches.
            form=f"{self._engine.name}, equal to rounding"
            if self._checked
            else f"{self._engine.name}, not checked",
        )


def chats_of(attention_mask: Tensor, segment_ids: Tensor | None) -> Iterator[tuple[int, slice]]:
    """Row and columns of each chat of [B, T] masks, padded on the right."""
    lengths = attention_mask.sum(dim=1).tolist()
    starts_BT = None if segment_ids is None else chat_starts(segment_ids)
    for row, length in enumerate(lengths):
        starts = [0] if starts_BT is None else starts_BT[row, :length].nonzero().squeeze(1).tolist()
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            yield row, slice(start, stop)


def _require_devices(config: TargetConfig, devices: Sequence[torch.device]) -> None:
    needed = config.vllm.tensor_parallel_size * config.vllm.pipeline_parallel_size
    if len(devices) != needed:
        raise ConfigError(
            "topology.devices_per_target must be target.vllm.tensor_parallel_size x "
            f"target.vllm.pipeline_parallel_size = {needed}, got {len(devices)}"
        )
    if devices[0].type == "cpu" and config.vllm.pipeline_parallel_size > 1:
        # Its runner on a CPU never makes room for the states that a stage receives.
        raise ConfigError(
            "target.vllm.pipeline_parallel_size must be 1 on a CPU, where vLLM runs no pipeline, "
            f"got {config.vllm.pipeline_parallel_size}"
        )


def _longest(config: TargetConfig, shape: TargetShape) -> int:
    """Tokens of the longest sequence, for which the engine keeps room: at most a whole request."""
    return config.max_length or min(shape.context or config.max_batch_tokens, config.max_batch_tokens)
