"""Targets of real shapes with random weights, and batches for them.

Legend: B batch, T sequence, H hidden, V target vocab, K draft vocab.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from measuring import median_seconds
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from eagle_rpc.config.choices import Quantization
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import TokenBatch, VocabMapping
from eagle_rpc.target.loading import plan_placement
from eagle_rpc.target.quantization import loading_arguments
from eagle_rpc.target.spread import Spread, place_tensors
from eagle_rpc.target.stored import remove_device_hooks

# Tokens of a chat, lognormally distributed; few chats reach the limit.
_MEDIAN_CHAT, _SIGMA, _SHORTEST_CHAT = 450, 0.8, 32


def devices_of(device: str, number: int) -> list[torch.device]:
    """`number` devices: of GPUs the first ones."""
    if device == "cpu":
        return [torch.device(device)] * number
    return [torch.device("cuda", index) for index in range(number)]


def make_model(
    fields: Mapping[str, Any],
    attention: str,
    devices: Sequence[torch.device],
    quantization: str | None = None,
) -> tuple[PreTrainedModel, Spread | None]:
    """Of a configuration's fields in bf16, drawn on its devices, equal in its processes.

    `quantization`: one of torchao's.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"bos_token_id": None, "eos_token_id": None, **fields})
    form = {"dtype": torch.bfloat16, "attn_implementation": attention}
    device, spread = devices[0], None
    if len(devices) == 1:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, **form)
    else:
        placement = plan_placement(TargetConfig(model="random"), config, len(devices))
        # A checkpoint without tensors: transformers draws each where the map puts it.
        kind = AutoModelForCausalLM._model_mapping[type(config)]
        # It reports all of them as missing.
        logging.set_verbosity_error()
        placed = {"device_map": placement.device_map(devices), "state_dict": {}}
        model = kind.from_pretrained(None, config=config, **placed, **form)
        remove_device_hooks(model)
        place_tensors(model, placement.device_map(devices))
        spread = Spread(model, placement, devices)
    if quantization is not None:
        from torchao.quantization import quantize_

        quantised = TargetConfig(quantization=Quantization[quantization])
        settings = loading_arguments(quantised, torch.bfloat16, device)["quantization_config"]
        quantize_(model.base_model, settings.quant_type)
    return model, spread


def fused_kernels(systems: Iterable[str]) -> dict[str, bool]:
    """The settings of `TargetConfig` for systems of these names."""
    return {
        "fused_rows": any("fused" in system for system in systems),
        "fused_mlp": any(system.endswith("fused") for system in systems),
    }


def make_mapping(config: PretrainedConfig) -> VocabMapping:
    """A quarter of the vocabulary, spread evenly; at most 32,000 tokens."""
    selected = torch.linspace(0, config.vocab_size - 1, min(32000, config.vocab_size // 4)).long()
    return VocabMapping.from_token_ids(selected, config.vocab_size)


def full_batch(batch: int, length: int, vocab_size: int, share: float, device: torch.device) -> TokenBatch:
    """Random tokens without padding, `share` of them supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (batch, length), generator=generator)
    loss_mask = torch.rand(batch, length, generator=generator) < share
    tokens = TokenBatch(input_ids=ids, attention_mask=torch.ones_like(ids).bool(), loss_mask=loss_mask)
    return tokens.to(device)


def chat_lengths(count: int, longest: int) -> list[int]:
    draw, median = random.Random(0), min(_MEDIAN_CHAT, longest // 3)
    drawn = (round(median * draw.lognormvariate(0.0, _SIGMA)) for _ in range(count))
    return [min(longest, max(_SHORTEST_CHAT, length)) for length in drawn]


def padded(
    lengths: list[int], shapes: list[tuple[int, int]], vocab_size: int, device: torch.device
) -> list[TokenBatch]:
    """Chats sorted by length, in batches of the shortest of `shapes` (B, T) that holds them."""
    batches, rest = [], sorted(lengths)
    while rest:
        size, length = next(shape for shape in shapes if shape[1] >= rest[0])
        taken = [one for one in rest[:size] if one <= length]
        rest = rest[len(taken) :]
        batches.append(_with_real([[one] for one in taken], length, vocab_size, device))
    return batches


def packed(
    lengths: list[int], batch: int, length: int, vocab_size: int, device: torch.device
) -> list[TokenBatch]:
    """Chats one after the other in rows of `length`, the longest first, each where it fits first."""
    rows: list[list[int]] = []
    for one in sorted(lengths, reverse=True):
        row = next((row for row in rows if sum(row) + one <= length), None)
        if row is None:
            rows.append(row := [])
        row.append(one)
    of_batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return [_with_real(some, length, vocab_size, device, packed=True) for some in of_batches]


def _with_real(
    rows: list[list[int]], length: int, vocab_size: int, device: torch.device, *, packed: bool = False
) -> TokenBatch:
    """Rows of chats of these lengths; the second half of every chat is supervised."""
    shape = (len(rows), length)
    real, supervised = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    segment_ids = torch.zeros(shape, dtype=torch.int64)
    for row, chats in enumerate(rows):
        start = 0
        for number, chat in enumerate(chats):
            real[row, start : start + chat] = True
            supervised[row, start + chat // 2 : start + chat] = True
            segment_ids[row, start : start + chat] = number
            start += chat
        segment_ids[row, start:] = len(chats)
    ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(length)) * real
    tokens = TokenBatch(input_ids=ids, attention_mask=real, loss_mask=supervised)
    return (replace(tokens, segment_ids=segment_ids) if packed else tokens).to(device)


def _products(model: PreTrainedModel) -> tuple[list[nn.Linear], nn.Linear]:
    """All linear layers of the decoder, and the head."""
    head = model.get_output_embeddings()
    modules = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [module for module in modules if module is not head], head


def flops_per_token(model: PreTrainedModel, length: int, share: float) -> float:
    """Of a forward pass with the head at the supervised `share` of rows; causal attention at its half."""
    products, head = _products(model)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * 2 * config.num_attention_heads * head_dim * length
    return 2.0 * (sum(one.weight.numel() for one in products) + share * head.weight.numel()) + attention


def shape_ceiling(
    model: PreTrainedModel, tokens: int, share: float, chunk_rows: int, devices: Sequence[torch.device]
) -> float:
    """Tokens per second of the matrix products of these shapes alone, measured for as long as a system is.

    A GPU lowers its clock within a second of matrix products: a shorter measurement would give a higher
    ceiling. Over several devices it is the slowest one's, each measured by itself.
    """
    return min(_ceiling_on(model, tokens, share, chunk_rows, device) for device in dict.fromkeys(devices))


def _ceiling_on(
    model: PreTrainedModel, tokens: int, share: float, chunk_rows: int, device: torch.device
) -> float:
    products, head = _products(model)
    products = [one for one in products if one.weight.device == device]
    rows = round(share * tokens)
    widths = {one.in_features for one in products}
    inputs = {width: torch.randn(tokens, width, device=device, dtype=model.dtype) for width in widths}

    def run() -> None:
        for one in products:
            one(inputs[one.in_features])
        if head.weight.device == device:
            for chunk in inputs[head.in_features][:rows].split(chunk_rows):
                head(chunk)

    with torch.inference_mode():
        return tokens / median_seconds(run, repeats=5, warmups=2, device=device)
