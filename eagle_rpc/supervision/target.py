"""What is asked of a target, and one batch through it: shared by the service and the co-located backend.

Legend: B batch, T sequence, H target hidden, W width of all captured states, V target vocab, K draft vocab.
"""

import dataclasses
import sys
import uuid
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.supervision.encoded import EncodedSupervision, encode_supervision
from eagle_rpc.supervision.encodings import ENCODINGS, DraftHead
from eagle_rpc.supervision.fingerprint import weights_fingerprint
from eagle_rpc.supervision.output import AnyOutput, TargetOutput
from eagle_rpc.supervision.session import ModelInfo
from eagle_rpc.supervision.tensors import shift_left
from eagle_rpc.supervision.tokens import TokenBatch
from eagle_rpc.supervision.vocab import DraftVocabOnDevice

_NO_LIMIT = sys.maxsize


class PlainTarget(Protocol):
    """The least that serves as a target, as NeMo AutoModel's wrapper does; `as_target` adds the rest."""

    def generate_batch(self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> AnyOutput:
        """Runs the target once on [B, T] ids on its device."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding [V, H]."""


@runtime_checkable
class Eagle3Target(Protocol):
    """All that is asked of a target."""

    takes_host_tokens: bool
    """Whether `generate_batch` takes tokens of any device; otherwise they are moved to the target's first."""
    devices: Sequence[torch.device]
    """In the order in which a pass visits them. Tokens belong on the first, the output is on the last."""

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> AnyOutput:
        """Runs the target once on [B, T] ids. Chats of different `segment_ids` do not see each other."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding [V, H], on the first device."""

    def model_info(self) -> ModelInfo:
        """Identity, with the model's own limits."""

    def draft_head(self, selected_token_ids: Tensor) -> DraftHead:
        """The head's rows for K target ids; raises `UnsupportedTarget` if there is no such form."""

    def probe_head(self, selected_token_ids: Tensor) -> None:
        """Runs the model; raises `UnsupportedTarget` unless `draft_head` computes what its own head does."""


def as_target(target: PlainTarget) -> Eagle3Target:
    """`target` if it has all members of `Eagle3Target`, otherwise with defaults for those that it lacks."""
    return target if isinstance(target, Eagle3Target) else _CompletedTarget(target)


class _CompletedTarget:
    """A target, with the defaults below for the members that it lacks."""

    takes_host_tokens = False

    def __init__(self, target: PlainTarget) -> None:
        self._architecture = type(target).__name__
        self._generate: Callable[..., AnyOutput] = target.generate_batch
        self.get_input_embeddings = target.get_input_embeddings
        self.devices: Sequence[torch.device] = (target.get_input_embeddings().weight.device,)
        for name in ("takes_host_tokens", "devices", "model_info", "draft_head", "probe_head"):
            if hasattr(target, name):
                setattr(self, name, getattr(target, name))

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> AnyOutput:
        """A target that knows nothing of packing fails on packed rows only."""
        packing = {} if segment_ids is None else {"segment_ids": segment_ids}
        return self._generate(input_ids, attention_mask, loss_mask, **packing)

    def model_info(self) -> ModelInfo:
        """What the token embedding tells."""
        embedding = self.get_input_embeddings()
        return ModelInfo(
            architecture=self._architecture,
            vocab_size=embedding.weight.shape[0],
            hidden_size=embedding.weight.shape[1],
            num_layers=0,
            aux_layer_ids=(),
            dtype=str(embedding.weight.dtype).removeprefix("torch."),
            max_length=_NO_LIMIT,
            max_batch_tokens=_NO_LIMIT,
            tokenizer_fingerprint=None,
            weights_fingerprint=weights_fingerprint(embedding),
            incarnation="",
        )

    def draft_head(self, selected_token_ids: Tensor) -> DraftHead:
        raise UnsupportedTarget(
            f"target {self._architecture} gives no rows of its head; use supervision.encoding=logits"
        )

    def probe_head(self, selected_token_ids: Tensor) -> None:
        """Nothing: the target's word is taken for its `draft_head`."""


def device_of(target: Eagle3Target) -> torch.device:
    """The device of the target's output: of supervision, vocabularies and replies."""
    return target.devices[-1]


def describe_target(
    target: Eagle3Target,
    *,
    max_length: int | None,
    max_batch_tokens: int,
    chunk_rows: int,
    incarnation: str | None = None,
) -> ModelInfo:
    """The target's identity with the limits of its configuration, and `incarnation` or else a random one.

    Raises `ConfigError` if `max_length` exceeds the model's context.
    """
    info = target.model_info()
    if max_length is not None and max_length > info.max_length:
        limit = f"the model's context {info.max_length}"
        raise ConfigError(f"target.max_length must be at most {limit}, got {max_length}")
    return dataclasses.replace(
        info,
        max_length=max_length or min(info.max_length, max_batch_tokens),
        max_batch_tokens=max_batch_tokens,
        incarnation=incarnation or uuid.uuid4().hex,
        # Matrix products of other shapes round differently.
        form=", ".join(filter(None, [info.form, f"{chunk_rows} rows a projection"])),
    )


def check_encoding(target: Eagle3Target, selected_token_ids: Tensor, encoding: str) -> None:
    """Raises `UnsupportedTarget` if trainers could not rebuild the distribution from `encoding` (a name)."""
    if ENCODINGS[encoding].needs_head:
        target.draft_head(selected_token_ids)
        target.probe_head(selected_token_ids)


def run_target(target: Eagle3Target, tokens: TokenBatch) -> AnyOutput:
    """The target's output for checked `tokens` on any device."""
    if not target.takes_host_tokens:
        tokens = tokens.to(target.devices[0])
    return target.generate_batch(
        tokens.input_ids, tokens.attention_mask, tokens.loss_mask, segment_ids=tokens.segment_ids
    )


@torch.no_grad()
def supervise(
    target: Eagle3Target,
    tokens: TokenBatch,
    vocab: DraftVocabOnDevice,
    *,
    encoding: str,
    rows: str,
    chunk_rows: int,
) -> EncodedSupervision:
    """Runs `target` on checked `tokens` on any device and encodes its output, on the target's device."""
    output = run_target(target, tokens)
    return encode_supervision(output, tokens, vocab, encoding=encoding, rows=rows, chunk_rows=chunk_rows)


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
    marks them. Returns `aux_hidden_states` [B, T, W], not shifted; `target_probs` [B, T, K] fp32;
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
