"""The check of an engine at its start: what transformers computes of a few tokens, in fp32 and in the target's dtype.

Legend: T probe tokens, W width of all captured states, H target hidden, V target vocab, C columns of the vocabulary.
"""

import gc
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.process.files import replaced_file
from eagle_rpc.target.capture import AuxStates, captured_layers, find_base, find_decoder_layers, run_base
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.model_files import load_target_config
from eagle_rpc.target.probes import ROUNDING, WHOLE_MODEL, refusing_failures, relative_error
from eagle_rpc.target.quantization import is_quantised

logger = logging.getLogger(__name__)

_PROBE_TOKENS, _PROBE_COLUMNS = 64, 512
# An engine may be as far from fp32 as transformers in the same dtype, times this: half formats round at random.
_SLACK = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The model by transformers; tensors are on the CPU."""

    ids: Tensor  # [T] int64
    states: Tensor  # [T, W + H] fp32, computed in fp32; of quantised models as transformers computes them
    own_errors: (
        Tensor  # [W / H + 1] fp32, of transformers in the target's dtype against `states`, for each state
    )
    last_hidden: Tensor  # [T, H] in the target's dtype
    columns: Tensor  # [C] int64
    logits: Tensor  # [T, C] fp32, of `last_hidden` by the model's own head

    @property
    def bounds(self) -> Tensor:
        """Largest allowed error of each state."""
        return _SLACK * self.own_errors + ROUNDING[torch.float32]

    def check_states(self, states: Tensor, name: str) -> None:
        """Raises `UnsupportedTarget` if an engine's [T, W + H] are further from fp32 than rounding explains."""
        errors = state_errors(states.cpu(), self.states, len(self.own_errors))
        told = ", ".join(
            f"{error:.1e} of {bound:.1e}" for error, bound in zip(errors, self.bounds, strict=True)
        )
        if not bool((errors <= self.bounds).all()):
            raise UnsupportedTarget(
                f"{name} must give the hidden states of transformers to rounding, but their relative errors, "
                f"captured layers first, are {told} allowed"
            )
        logger.info(
            "%s agrees with transformers: relative errors, captured layers first, %s allowed", name, told
        )

    def check_head(self, logits_TV: Tensor) -> None:
        """Raises `UnsupportedTarget` if a head gives other logits [T, V] of `last_hidden`."""
        error = relative_error(logits_TV[:, self.columns.to(logits_TV.device)].cpu(), self.logits)
        if not error <= ROUNDING[self.last_hidden.dtype]:
            raise UnsupportedTarget(
                f"the stored head must be the model's own, its relative error is {error:.1e}"
            )


def state_errors(states: Tensor, expected: Tensor, num_states: int) -> Tensor:
    """[num_states]: norm of the difference over the norm of what is expected, for each token, the mean over tokens.

    A norm over all tokens would tell of the few alone whose states are a thousand times larger.
    """
    difference, norm = (
        tensor.unflatten(-1, (num_states, -1)).norm(dim=-1)
        for tensor in (states.float() - expected.float(), expected.float())
    )
    return (difference / norm.clamp_min(1e-12)).mean(dim=0)


def load_reference(
    config: TargetConfig,
    devices: Sequence[torch.device],
    aux_layer_ids: Sequence[int],
    *,
    fingerprint: str,
    cache_dir: Path,
) -> Reference:
    """The reference of a model with this fingerprint, from a file below `cache_dir` if it was made before.

    Otherwise transformers loads the model over `devices`, and all of it is freed again: call it before vLLM is
    imported, which changes classes of transformers. Raises the errors of `HFEagle3TargetModel.load`.
    """
    dtype = config.dtype.value
    num_tokens = min(_PROBE_TOKENS, config.max_length or _PROBE_TOKENS)
    key = [fingerprint, dtype, list(aux_layer_ids), transformers.__version__, devices[0].type, num_tokens]
    path = cache_dir / f"engine-check-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        logger.info("transformers loads the model once, for the check of the engine (target.vllm.check)")
        made = _make_reference(config, devices, aux_layer_ids, cache_dir, num_tokens)
        gc.collect()
        if devices[0].type == "cuda":
            torch.cuda.empty_cache()
        with replaced_file(path) as fresh:
            save_file({name: tensor.contiguous() for name, tensor in made.items()}, fresh)
    return Reference(**load_file(path))


@torch.inference_mode()
def _make_reference(
    config: TargetConfig,
    devices: Sequence[torch.device],
    aux_layer_ids: Sequence[int],
    cache_dir: Path,
    num_tokens: int,
) -> dict[str, Tensor]:
    quantised = is_quantised(config, load_target_config(config, cache_dir=cache_dir))
    target = HFEagle3TargetModel.load(config, *devices, cache_dir=cache_dir)
    vocab_size = target.model_info().vocab_size
    ids_T = torch.linspace(0, vocab_size - 1, min(num_tokens, target.model_info().max_length)).long()
    everything = torch.ones_like(ids_T)[None]
    output = target.generate_batch(ids_T[None], everything, everything)
    last_TH = output.last_hidden_state[0]
    states = torch.cat((output.aux_hidden_states[0], last_TH), dim=-1)
    columns = torch.linspace(0, vocab_size - 1, min(_PROBE_COLUMNS, vocab_size)).long()
    logits = output.project(last_TH)[:, columns.to(last_TH.device)]
    num_states = len(aux_layer_ids) + 1
    if quantised:
        # Their layers have no form in fp32: two ways of computing them may differ as whole models do.
        own_errors = torch.full((num_states,), WHOLE_MODEL * ROUNDING[last_TH.dtype])
        exact = states
    else:
        with refusing_failures("target.vllm.check must be false for a model that does not run in fp32"):
            exact = _in_float32(target, ids_T, aux_layer_ids)
        own_errors = state_errors(states.to(exact.device), exact, num_states)
    made = {
        "ids": ids_T,
        "states": exact.float(),
        "own_errors": own_errors,
        "last_hidden": last_TH,
        "columns": columns,
        "logits": logits.float(),
    }
    return {name: tensor.cpu().clone() for name, tensor in made.items()}


def _in_float32(target: HFEagle3TargetModel, ids_T: Tensor, aux_layer_ids: Sequence[int]) -> Tensor:
    """[T, W + H] of the weights in fp32, one layer of which exists at a time. The model is of no use afterwards."""
    model = target.model
    layers = find_decoder_layers(model)
    dtype = model.dtype
    inside = {id(parameter) for parameter in layers.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.float()
    for layer in layers:
        layer.register_forward_pre_hook(_widen)
        layer.register_forward_hook(partial(_narrow, dtype))
    aux = AuxStates((1, len(ids_T)), len(aux_layer_ids), lambda state: state.to(target.devices[-1]))
    with captured_layers(layers, aux_layer_ids, aux.write):
        last_BTH = run_base(find_base(model), ids_T[None].to(target.devices[0]))
    return torch.cat((aux.states[0], last_BTH[0].to(aux.states.device)), dim=-1)


def _widen(layer: nn.Module, args: Any) -> None:
    layer.float()


def _narrow(dtype: torch.dtype, layer: nn.Module, args: Any, output: Any) -> None:
    layer.to(dtype)
