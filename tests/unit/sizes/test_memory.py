"""Memory of a target by formula, checked against what a forward pass holds.

Legend: B batch, T sequence, H hidden, I intermediate width, V vocab.
"""

import pytest
import torch
from support.families import tiny_config, tiny_model

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.sizes.memory import Load, activation_bytes, memory_by_device
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.loading import plan_placement, target_outline, weight_format
from eagle_rpc.target.placement import Placement

BATCH, LENGTH = 4, 32


def load_of(**changes):
    form = {"dtype_bytes": 2, "chunk_rows": 50, "copies_logits": False, "eager": False, "reply_bytes": 1e6}
    return Load(**{"batch": BATCH, "length": LENGTH, **form, **changes})


def devices_of(num_devices, load, family="llama"):
    config = tiny_config(family)
    placement = plan_placement(TargetConfig(model=family), config, num_devices)
    return placement, memory_by_device(placement, TargetShape.of(config), load)


def test_a_target_on_one_device_holds_two_passes_a_chunk_of_logits_and_the_replies():
    placement, (alone,) = devices_of(1, load_of())
    hidden = BATCH * LENGTH * 32 * 2
    assert alone.weights == placement.costs[0].num_bytes
    assert alone.under_way == 2 * 4 * hidden
    assert (alone.head, alone.replies) == (50 * 96 * 2, 1e6)
    assert alone.total == alone.weights + alone.activations + alone.under_way + alone.head + alone.replies


def test_over_three_devices_four_passes_are_under_way_and_the_last_makes_replies():
    placement, devices = devices_of(3, load_of())
    hidden = BATCH * LENGTH * 32 * 2
    assert [one.under_way for one in devices] == [4 * hidden, 8 * hidden, 4 * hidden + 16 * hidden]
    assert [bool(one.head or one.replies) for one in devices] == [False, False, True]
    assert [one.weights for one in devices] == [cost.num_bytes for cost in placement.costs]


def test_logits_that_are_copied_to_fp32_take_six_bytes():
    _, (copied,) = devices_of(1, load_of(copies_logits=True))
    assert copied.head == 50 * 96 * 6


class Held(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest sum of the bytes of tensors that operations have made and that still live."""

    def __init__(self):
        super().__init__()
        self._held, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._held[storage._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self._held = {key: one for key, one in self._held.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._held.values()))
        return result


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("qwen3_moe", "sdpa")]
)
def test_the_formula_of_activations_is_near_what_a_layer_holds(family, attention):
    """Within a factor of two: which intermediate results live at the same time is the model's own affair."""
    model = tiny_model(family)
    model.config._attn_implementation = attention
    ids = torch.zeros(BATCH, 128, dtype=torch.int64)
    with torch.inference_mode(), Held() as held:
        model.model(input_ids=ids, use_cache=False)
    load = load_of(length=128, dtype_bytes=4, eager=attention == "eager")
    expected = activation_bytes(TargetShape.of(model.config), load)
    assert expected / 2 < held.peak < expected * 2


@pytest.mark.parametrize(("quantization", "share"), [({"quant_method": "gptq", "bits": 4}, 1 / 4), (None, 1)])
def test_quantised_layers_count_by_their_bits_and_the_head_by_its_dtype(quantization, share):
    config, settings = tiny_config("llama"), TargetConfig(model="llama")
    outline = target_outline(settings, config)
    if quantization is not None:
        config.quantization_config = quantization
    placement = Placement.of(outline, 1, weight_format(settings, config))
    layers = [weight for layer in outline.model.layers for weight in layer.parameters()]
    in_layers = sum(weight.numel() for weight in layers if weight.dim() > 1)
    others = sum(weight.numel() for weight in outline.parameters()) - in_layers
    assert placement.costs[0].num_bytes == 2 * (others + share * in_layers)
