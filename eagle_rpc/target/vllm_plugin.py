"""A plugin of vLLM (entry point group `vllm.general_plugins`): models that return captured and last hidden states.

vLLM runs `register` in each of its processes. For every architecture X that vLLM knows there is then `EagleRpcX`:
the same model without its head, whose output has the captured layers and the last hidden state side by side. A
pooling runner returns them for each token of a prompt (`LLM.encode` with `token_embed`).
"""

from typing import Any

PREFIX = "EagleRpc"
LAYERS = "eagle_rpc_layers"
"""Key of `hf_overrides` with the captured layers, counted from 0, read after the layer."""
# Runs the model of transformers inside vLLM, for architectures that vLLM has no code of its own for.
_BACKEND = "TransformersForCausalLM"


def register() -> None:
    """Makes the models known to vLLM by their names alone; their code is imported when one is built."""
    from vllm import ModelRegistry

    for name in list(ModelRegistry.get_supported_archs()):
        if not name.startswith(PREFIX):
            ModelRegistry.register_model(PREFIX + name, f"{__name__}:{PREFIX}{name}")


def registered_name(architecture: str) -> str:
    """The name of the model that returns the hidden states of `architecture`."""
    from vllm import ModelRegistry

    known = architecture in ModelRegistry.get_supported_archs()
    return PREFIX + (architecture if known else _BACKEND)


def __getattr__(name: str) -> type:
    """The class of a registered name, made from vLLM's own when it is imported."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from vllm import ModelRegistry

    made = _returning_states(ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls())
    made.__name__ = made.__qualname__ = name
    return made


def _returning_states(base: Any) -> type:
    """Raises `TypeError` for a model of vLLM that gives no states of its layers."""
    import torch
    from torch import Tensor
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.sequence import IntermediateTensors

    if not supports_eagle3(base):
        raise TypeError(f"{base.__name__} of vLLM does not give the states of its layers (SupportsEagle3)")

    class ReturningStates(base):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            layers = getattr(vllm_config.model_config.hf_config, LAYERS)
            # vLLM counts states before the layer.
            self.set_aux_hidden_state_layers(tuple(layer + 1 for layer in layers))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if isinstance(output, IntermediateTensors):
                # A stage of the pipeline before the last.
                return output
            last_NH: Tensor
            last_NH, aux = output
            return torch.cat([*aux, last_NH], dim=-1)

    return ReturningStates
