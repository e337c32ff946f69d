"""A target over several cards: the bits of one card, and what travels between them.

The cards are parts of one CPU's memory that may not be used together (`support.cards`).
"""

import copy
import dataclasses

import pytest
import torch
from support.cards import MixedCards, placed_on_cards
from support.families import tiny_config, tiny_model
from support.tiny_tokenizer import save_with_tokenizer

from eagle_rpc.config.choices import CompileMode, DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import DraftVocabOnDevice, TokenBatch, VocabMapping, supervise
from eagle_rpc.target.loading import load_spread
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.stored import auto_class

VOCAB, LAYERS, AUX = 96, 6, [0, 2, 4]
# Dense; with norms of queries and keys; two kinds of masks and rotary tables; experts; keys that later layers
# share; a tied head and no rotary table; sinks; a bias for each head.
FAMILIES = ["llama", "qwen3", "gemma3_text", "qwen3_moe", "gemma4_text", "gpt2", "gpt_oss", "bloom"]
# Otherwise these are lists as long as the default number of layers.
KINDS_OF_LAYERS = {
    "gemma3_text": {"layer_types": None},
    "gpt_oss": {"layer_types": None},
    "gemma4_text": {"layer_types": 3 * ["sliding_attention", "full_attention"], "num_kv_shared_layers": 2},
}


def model_of(family, attention="eager"):
    """A model with values, and its outline without."""
    changes = {"num_hidden_layers": LAYERS, "initializer_range": 0.3, **KINDS_OF_LAYERS.get(family, {})}
    config = tiny_config(family, **changes)
    form = {"attn_implementation": attention, "dtype": torch.float32}
    torch.manual_seed(0)
    model = auto_class(config).from_config(copy.deepcopy(config), **form)
    with torch.device("meta"):
        outline = auto_class(config).from_config(copy.deepcopy(config), **form)
    return model.eval(), outline.eval()


def batch_of(seed, *, packed=False):
    ids = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(16)[None] < torch.tensor([[16], [12], [9]])).long()
    tokens = TokenBatch(input_ids=ids * mask, attention_mask=mask, loss_mask=mask)
    segments = (torch.arange(16)[None] >= 5).long().repeat(3, 1)
    return dataclasses.replace(tokens, segment_ids=segments) if packed else tokens


def supervised(target, tokens, encoding="logits"):
    mapping = VocabMapping.from_token_ids(torch.arange(0, VOCAB, 3), VOCAB)
    vocab = DraftVocabOnDevice.of(mapping, torch.device("cpu"))
    return supervise(target, tokens, vocab, encoding=encoding, rows="loss_mask", chunk_rows=16)


def assert_same_bits(one, other):
    for name in ("aux", "supervised_rows", "values", "log_normalizer", "argmax"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("num_cards", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_several_cards_give_the_bits_of_one(family, num_cards):
    model, outline = model_of(family)
    alone = HFEagle3TargetModel(copy.deepcopy(model), aux_layer_ids=AUX)
    spread, placement, cards = placed_on_cards(model, outline, num_cards)
    assert all(placement.num_layers) and sum(placement.num_layers) == LAYERS
    with cards:
        target = HFEagle3TargetModel(model, aux_layer_ids=AUX, spread=spread)
        replies = [supervised(target, batch_of(seed), "hidden") for seed in range(2)]
        made_on = {cards.card_of(tensor) for reply in replies for tensor in (reply.aux, reply.values)}
    assert made_on == {num_cards - 1}
    for seed, reply in enumerate(replies):
        assert_same_bits(reply, supervised(alone, batch_of(seed), "hidden"))


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("gemma3_text", "sdpa"), ("qwen3", "eager")]
)
def test_packed_chats_have_the_bits_of_one_card(family, attention):
    model, outline = model_of(family, attention)
    alone = HFEagle3TargetModel(copy.deepcopy(model), aux_layer_ids=AUX)
    spread, _, cards = placed_on_cards(model, outline, 3)
    with cards:
        reply = supervised(
            HFEagle3TargetModel(model, aux_layer_ids=AUX, spread=spread), batch_of(1, packed=True)
        )
    assert_same_bits(reply, supervised(alone, batch_of(1, packed=True)))


def test_what_many_layers_read_crosses_once_in_a_pass():
    model, outline = model_of("llama")
    spread, placement, cards = placed_on_cards(model, outline, 3)
    assert placement.num_layers == (2, 2, 2)
    with cards:
        target = HFEagle3TargetModel(model, aux_layer_ids=[0, 1, 4], spread=spread)
        cards.copies.clear()
        for _ in range(2):
            supervised(target, batch_of(0))
    # In each pass: sines and cosines from the first card to both others; captured layer 0; the hidden states
    # behind layer 1, captured and passed on; those behind layer 3.
    tables, captured, passed_on = 2 * [(0, 1), (0, 2)], 2 * [(0, 2)], [(0, 1), (1, 2)]
    assert sorted(cards.copies) == sorted(2 * (tables + captured + passed_on))


def test_cards_of_the_tests_are_told_apart():
    model, outline = model_of("llama")
    _, _, cards = placed_on_cards(model, outline, 2)
    for layer in model.model.layers:
        layer._forward_pre_hooks.clear()
    with cards, pytest.raises(MixedCards, match=r"cards \[0, 1\]"):
        model(input_ids=torch.arange(8)[None])


def save(directory, family, **changes):
    return save_with_tokenizer(tiny_model(family, **changes), directory)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return save(tmp_path_factory.mktemp("stored"), "gemma2", num_hidden_layers=LAYERS)


def random_config():
    fields = tiny_config("llama", num_hidden_layers=LAYERS).to_dict()
    return TargetConfig(model="random", random=fields, dtype=DType.float32, aux_layer_ids=AUX)


def assert_loads_over_devices(config, cache_dir):
    one, three = (
        HFEagle3TargetModel.load(config, *["cpu"] * num_devices, cache_dir=cache_dir)
        for num_devices in (1, 3)
    )
    assert len(three.devices) == 3
    assert_same_bits(supervised(three, batch_of(0)), supervised(one, batch_of(0)))
    assert three.model_info().weights_fingerprint == one.model_info().weights_fingerprint
    assert three.model_info().form == one.model_info().form


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "gemma3"])
def test_a_stored_model_is_loaded_over_devices_with_the_bits_and_identity_of_one(family, tmp_path):
    """With a tied head; with experts that transformers stacks while it reads them; inside a vision-language model."""
    directory = save(tmp_path / "model", family)
    config = TargetConfig(model=str(directory), dtype=DType.float32, aux_layer_ids=[0, 1, 2])
    assert_loads_over_devices(config, tmp_path)


def test_a_random_model_is_loaded_over_devices_with_the_bits_and_identity_of_one(tmp_path):
    assert_loads_over_devices(random_config(), tmp_path)


def test_transformers_own_hooks_between_devices_are_taken_off(stored, tmp_path):
    """They copy on the streams in use, so each card would wait for the other. Here the second card has no values."""
    devices = [torch.device("cpu"), torch.device("meta")]
    config = TargetConfig(model=str(stored), dtype=DType.float32)
    model, _, spread, _ = load_spread(config, devices, cache_dir=tmp_path)
    assert spread is not None and {weight.device for weight in model.parameters()} == set(devices)
    assert model.lm_head.weight.is_meta and not model.get_input_embeddings().weight.is_meta
    assert not any(hasattr(module, "_hf_hook") or "forward" in vars(module) for module in model.modules())


def test_compiled_layers_over_devices_have_the_bits_of_one(tmp_path):
    config, replies = random_config(), []
    for num_devices in (1, 2):
        target = HFEagle3TargetModel.load(config, *["cpu"] * num_devices, cache_dir=tmp_path)
        target.compile(["3x16"], packed=True, mode=CompileMode.default)
        replies.append([supervised(target, batch_of(0, packed=packed)) for packed in (False, True)])
        torch.compiler.reset()
    for one, other in zip(*replies, strict=True):
        assert_same_bits(one, other)
