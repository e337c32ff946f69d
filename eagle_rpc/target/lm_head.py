"""The target's output head: run as it is, and rebuilt for the trainer.

Legend: B batch, T sequence, N rows, H target hidden, V target vocab, K draft vocab.
"""

import copy
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.supervision import DraftHead
from eagle_rpc.target.capture import find_base, find_decoder
from eagle_rpc.target.probes import ROUNDING, relative_error

# Largest logit of the probe: far above every soft cap in use, so that a missing cap shows.
_PROBE_LOGIT = 200.0


class OwnHead:
    """The model's own code after its decoder, on given last hidden states.

    This is the model's `forward` with the identity in the decoder's place: scales, caps and casts included.
    The decoder's output is of its own class, whose other fields are null.
    """

    def __init__(self, model: PreTrainedModel, output_class: type[ModelOutput]) -> None:
        base, decoder = find_base(model), find_decoder(model)
        # Most models call their base; some (OPT, those cut out of an encoder-decoder) the decoder inside it.
        inner = copy.copy(decoder)
        outer = _with_other(base, decoder, inner)
        inner.forward = outer.forward = partial(_pass_through, output_class)
        self._model = _with_other(model, base, outer)

    def project(self, hidden_NH: Tensor) -> Tensor:
        """Final logits [N, V] of last hidden states."""
        return self._model(inputs_embeds=hidden_NH.unsqueeze(0), use_cache=False).logits.squeeze(0)


def _with_other(module: nn.Module, part: nn.Module, other: nn.Module) -> nn.Module:
    """The module with `other` in the place of `part`. Copies are shallow: weights are shared, `module` stays."""
    if module is part:
        return other
    changed = {
        name: _with_other(child, part, other)
        for name, child in module.named_children()
        if any(inner is part for inner in child.modules())
    }
    copied = copy.copy(module)
    copied._modules = {**module._modules, **changed}
    return copied


def _pass_through(
    output_class: type[ModelOutput], *unused: Any, inputs_embeds: Tensor, **also_unused: Any
) -> ModelOutput:
    return output_class(last_hidden_state=inputs_embeds)


def draft_head(model: PreTrainedModel, selected_token_ids: Tensor) -> DraftHead:
    """The head's rows of the draft vocabulary [K], with the scale and soft cap of the config.

    Raises `UnsupportedTarget` for heads that are not a plain linear layer.
    """
    head = model.get_output_embeddings()
    plain = isinstance(head, nn.Linear) and type(head.weight) is nn.Parameter
    # A quantised head has weights of another type or dtype; their rows alone are not rows of the head.
    if not plain or head.weight.dtype not in ROUNDING:
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
    """Raises `UnsupportedTarget` unless `own_head` of `hidden_BTH` equals a full forward of `ids_BT`."""
    name = type(model).__name__
    expected_NV = model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)
    try:
        error = relative_error(own_head.project(hidden_BTH.flatten(0, 1)), expected_NV)
    except (AttributeError, RuntimeError, TypeError) as cause:
        raise UnsupportedTarget(f"the head of {name} does not run without its decoder ({cause})") from cause
    if not error <= ROUNDING[hidden_BTH.dtype]:
        raise UnsupportedTarget(
            f"the head of {name} does not work on last hidden states alone (relative error {error:.1e})"
        )


def probe_draft_head(rebuilt: DraftHead, own_head: OwnHead, selected_ids: Tensor, hidden_NH: Tensor) -> None:
    """Raises `UnsupportedTarget` if the rebuilt head differs from the model's own by more than rounding.

    They are compared on the rows as they are, and scaled to large logits: small ones hide a soft cap.
    """
    uncapped = DraftHead(weight=rebuilt.weight, bias=rebuilt.bias, scale=rebuilt.scale)
    largest = uncapped.project(hidden_NH).abs().max().float().clamp_min(1e-6)
    for rows_NH in (hidden_NH, hidden_NH * (_PROBE_LOGIT / largest).to(hidden_NH.dtype)):
        expected_NK = own_head.project(rows_NH)[:, selected_ids.to(hidden_NH.device)]
        error = relative_error(rebuilt.project(rows_NH), expected_NK)
        if not error <= ROUNDING[hidden_NH.dtype]:
            raise UnsupportedTarget(
                "the target's head must be weight, bias, scale and soft cap only "
                f"(relative error {error:.1e}); use supervision.encoding=logits"
            )
