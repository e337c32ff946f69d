"""The target's output head: run as it is, and rebuilt for the trainer.

Legend: B batch, T sequence, N rows, H target hidden, V target vocab, K draft vocab.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.supervision import DraftHead
from eagle_rpc.target.capture import find_base
from eagle_rpc.target.probes import ROUNDING, relative_error

# Largest logit of the probe: far beyond every soft cap in use, where a cap that one side lacks shows.
_PROBE_LOGIT = 200.0


class OwnHead:
    """What the model does to its last hidden states: its own forward with the identity in the decoder's place.

    Whatever a model does after its decoder (scales, caps, casts) happens here because its own code runs.
    """

    def __init__(self, model: PreTrainedModel):
        decoder = copy.copy(find_base(model))
        decoder.forward = _pass_through
        # Shallow copies: the weights stay the model's, and the model itself keeps its decoder.
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, model.base_model_prefix: decoder}

    def project(self, hidden_NH: Tensor) -> Tensor:
        """Final logits [N, V] of last hidden states."""
        return self._model(inputs_embeds=hidden_NH.unsqueeze(0), use_cache=False).logits.squeeze(0)


def _pass_through(*unused: Any, inputs_embeds: Tensor, **also_unused: Any) -> MoeModelOutputWithPast:
    return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def draft_head(model: PreTrainedModel, selected_token_ids: Tensor) -> DraftHead:
    """The head's rows of the draft vocabulary [K], with what the config says of scale and soft cap.

    Raises `UnsupportedTarget` for heads that are not a plain linear layer.
    """
    head = model.get_output_embeddings()
    # The weights of a quantised head are of another type or dtype, and their rows alone would not be the head's.
    if (
        not isinstance(head, nn.Linear)
        or type(head.weight) is not nn.Parameter
        or head.weight.dtype not in ROUNDING
    ):
        raise UnsupportedTarget(
            f"the head of {type(model).__name__} is no plain linear layer; use supervision.encoding=logits"
        )
    rows = selected_token_ids.to(head.weight.device)
    return DraftHead(
        weight=head.weight.detach()[rows],
        bias=None if head.bias is None else head.bias.detach()[rows],
        scale=_logit_scale(model),
        soft_cap=getattr(model.config.get_text_config(), "final_logit_softcapping", None),
    )


def _logit_scale(model: PreTrainedModel) -> float | None:
    config = model.config.get_text_config()
    scale = 1.0
    for factor in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon H1
        scale *= getattr(config, factor, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return None if scale == 1.0 else scale


def check_own_head(own_head: OwnHead, model: PreTrainedModel, ids_BT: Tensor, hidden_BTH: Tensor) -> None:
    """Raises `UnsupportedTarget` unless `own_head` on the last hidden states gives what a full forward of `ids_BT` gives."""
    expected_NV = model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)
    try:
        error = relative_error(own_head.project(hidden_BTH.flatten(0, 1)), expected_NV)
    except (AttributeError, RuntimeError, TypeError) as cause:
        raise UnsupportedTarget(
            f"the head of {type(model).__name__} does not run without its decoder ({cause})"
        ) from cause
    if not error <= ROUNDING[hidden_BTH.dtype]:
        raise UnsupportedTarget(
            f"the head of {type(model).__name__} does not work on last hidden states alone (error {error:.1e})"
        )


def probe_draft_head(
    rebuilt: DraftHead, own_head: OwnHead, selected_token_ids: Tensor, hidden_NH: Tensor
) -> None:
    """Compares the rebuilt head with the model's own on the rows as they are, then scaled to large logits.

    Small logits hide a soft cap. Raises `UnsupportedTarget` where the two differ by more than rounding.
    """
    uncapped = DraftHead(weight=rebuilt.weight, bias=rebuilt.bias, scale=rebuilt.scale)
    largest = uncapped.project(hidden_NH).abs().max().float().clamp_min(1e-6)
    for rows_NH in (hidden_NH, hidden_NH * (_PROBE_LOGIT / largest).to(hidden_NH.dtype)):
        expected_NK = own_head.project(rows_NH)[:, selected_token_ids.to(hidden_NH.device)]
        error = relative_error(rebuilt.project(rows_NH), expected_NK)
        if not error <= ROUNDING[hidden_NH.dtype]:
            raise UnsupportedTarget(
                f"the target's head is more than weight, bias, scale and soft cap (relative error {error:.1e}); "
                "use supervision.encoding=logits"
            )
