"""Which layers of a target are on which device, from its structure alone."""

import itertools

import pytest
import torch
from support.families import tiny_config

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.sizes.outline import Cost, WeightFormat, balance
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.loading import plan_placement
from eagle_rpc.target.stored import auto_class

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def outline_of(config):
    with torch.device("meta"):
        return auto_class(config).from_config(config).eval()


def placement_of(family, num_devices, **changes):
    return plan_placement(TargetConfig(model=family), tiny_config(family, **changes), num_devices)


def largest_share(layers, counts, before, behind):
    whole = sum(layers, before + behind)
    stops = list(itertools.accumulate(counts, initial=0))
    shares = []
    for start, stop in itertools.pairwise(stops):
        own = sum(layers[start:stop], before if start == 0 else Cost())
        own += behind if stop == len(layers) else Cost()
        shares += [own.num_bytes / whole.num_bytes / 1.1, own.passed / whole.passed]
    return max(shares)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_leaves_a_smaller_largest_share(seed):
    draw = torch.Generator().manual_seed(seed)
    costs = [Cost(*row) for row in (torch.rand(9, 2, generator=draw) + 0.05).tolist()]
    layers, before, behind = costs[2:], costs[0], costs[1]
    num_devices = 2 + seed % 3
    chosen = balance(layers, num_devices, before=before, behind=behind)
    all_cuts = (
        tuple(stop - start for start, stop in itertools.pairwise((0, *cuts, len(layers))))
        for cuts in itertools.combinations(range(1, len(layers)), num_devices - 1)
    )
    best = min(largest_share(layers, counts, before, behind) for counts in all_cuts)
    assert largest_share(layers, chosen, before, behind) == pytest.approx(best)
    assert sum(chosen) == len(layers) and all(chosen)


def test_head_and_embedding_count_in_the_balance():
    config = TargetConfig(model="llama", random=LLAMA_70B)
    # Head and embedding weigh as much as 1.2 layers each; the embedding takes no time.
    assert plan_placement(config, auto_config(LLAMA_70B), 2).num_layers == (41, 39)
    *others, last = plan_placement(config, auto_config(LLAMA_70B), 8).num_layers
    assert last == 9 and max(others) == 11


def auto_config(fields):
    from transformers import AutoConfig

    rest = {name: value for name, value in fields.items() if name != "model_type"}
    return AutoConfig.for_model(fields["model_type"], **rest)


def test_a_token_passes_a_share_of_the_experts():
    placed, config = placement_of("qwen3_moe", 2), tiny_config("qwen3_moe")
    assert (config.num_experts, TargetShape.of(config).experts_per_token) == (4, 2)
    layer = outline_of(config).model.layers[0]
    of_experts = sum(weight.numel() for weight in layer.mlp.experts.parameters())
    others = sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1) - of_experts
    head = 96 * config.hidden_size
    assert sum(cost.passed for cost in placed.costs) == 4 * (of_experts / 2 + others) + head


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_all_devices_are_those_of_all_weights(tied):
    whole = outline_of(tiny_config("llama", tie_word_embeddings=tied))
    num_bytes = 2 * sum(weight.numel() for weight in whole.parameters())
    # A head on another device has its own weights.
    second_copy = 2 * 96 * whole.config.hidden_size if tied else 0
    for num_devices in (1, 2, 4):
        placed = placement_of("llama", num_devices, tie_word_embeddings=tied)
        expected = num_bytes + (second_copy if num_devices > 1 else 0)
        assert sum(cost.num_bytes for cost in placed.costs) == expected
        assert [len(placed.layers_of(number)) for number in range(num_devices)] == list(placed.num_layers)


def test_parts_before_the_layers_are_on_the_first_device_and_those_behind_on_the_last():
    placed = placement_of("gemma3", 2)
    last = {name for name, number in placed.device_of.items() if number == 1}
    assert {"lm_head", "model.language_model.norm"} <= last
    assert {"model.vision_tower", "model.language_model.embed_tokens"}.isdisjoint(last)
    assert "model.language_model.layers.3" in last and "model.language_model.layers.0" not in last


def test_fewer_layers_than_devices_are_refused_with_both_numbers():
    rule = "topology.devices_per_target must be at most the 4 decoder layers of LlamaForCausalLM, got 5"
    with pytest.raises(ConfigError, match=rule):
        placement_of("llama", 5)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mllama", "model.norm runs behind layer 2 of 4"), ("zamba2", "whose layers share weights")],
)
def test_a_model_whose_parts_do_not_run_in_a_line_is_refused(family, reason):
    with pytest.raises(UnsupportedTarget, match=rf"topology\.devices_per_target must be 1 for .*{reason}"):
        placement_of(family, 2)


def test_planning_leaves_the_outline_as_it_was():
    outline = outline_of(tiny_config("llama"))
    before = outline.config._attn_implementation
    from eagle_rpc.target.placement import Placement

    Placement.of(outline, 2, WeightFormat(2, 2))
    assert outline.config._attn_implementation == before
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in outline.modules())
