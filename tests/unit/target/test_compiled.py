"""Compiled targets against eager ones; `trace_only` leaves out what the C++ compiler would do.

Legend: B batch, T sequence.
"""

import logging

import pytest
import torch
import torch._inductor.config
from support.supervised_batches import assert_same_supervision, colocated, served, supervision_of
from torch._dynamo.utils import counters

from eagle_rpc.config.choices import CompileMode, DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import InvalidRequest, TargetFailed, UnsupportedTarget
from eagle_rpc.supervision import (
    TokenBatch,
    VocabMapping,
)
from eagle_rpc.target.compiled import Buckets, Shape
from eagle_rpc.target.model import HFEagle3TargetModel

LAYERS = [0, 3, 6]
MAPPING = VocabMapping.from_token_ids(torch.arange(0, 97, 3), 97)
CONFIG = TargetConfig(model="tiny", chunk_rows=5)


def make_target(model, shapes, packed=False):
    target = HFEagle3TargetModel(model, aux_layer_ids=LAYERS)
    target.compile(shapes, packed=packed, mode=CompileMode.default)
    return target


def batch_of(batch, length, seed=0, packed=False):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (batch, 1), generator=generator)
    mask = torch.arange(length)[None] < lengths
    return TokenBatch(
        input_ids=torch.randint(3, 97, (batch, length), generator=generator),
        attention_mask=mask.long(),
        loss_mask=(mask & (torch.rand(batch, length, generator=generator) < 0.8)).long(),
        segment_ids=(torch.arange(length)[None] >= length // 2).long().repeat(batch, 1) if packed else None,
    )


def run(target, tokens):
    packing = {} if tokens.segment_ids is None else {"segment_ids": tokens.segment_ids}
    return target.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask, **packing)


def num_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("batch", "length", "pieces"),
    [
        (4, 8, [(0, 4, "4x8")]),
        (1, 3, [(0, 1, "2x8")]),
        (2, 9, [(0, 2, "2x16")]),
        (3, 16, [(0, 2, "2x16"), (2, 3, "2x16")]),
        (7, 8, [(0, 4, "4x8"), (4, 7, "4x8")]),
        (6, 5, [(0, 4, "4x8"), (4, 6, "2x8")]),
    ],
)
def test_a_batch_is_cut_and_padded_to_the_smallest_shapes_that_hold_it(batch, length, pieces):
    buckets = Buckets(["2x16", "4x8", "2x8", "4x8"])
    assert buckets.shapes == [Shape(2, 8), Shape(4, 8), Shape(2, 16)]
    assert [(rows.start, rows.stop, str(shape)) for rows, shape in buckets.pieces(batch, length)] == pieces
    with pytest.raises(InvalidRequest, match=r"at most 16 tokens long \(target\.compile_shapes\), got 17"):
        list(buckets.pieces(1, 17))


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_target_gives_what_an_eager_one_does(any_model, packed, trace_only):
    eager = HFEagle3TargetModel(any_model, aux_layer_ids=LAYERS)
    tokens = [batch_of(batch, length, packed=packed) for batch, length in ((2, 12), (3, 12), (1, 7), (5, 4))]
    expected = [run(eager, one) for one in tokens]
    target = make_target(any_model, ["2x12", "2x8"], packed)
    for one, wanted in zip(tokens, expected, strict=True):
        output, real = run(target, one), one.attention_mask.bool()
        torch.testing.assert_close(
            output.aux_hidden_states[real], wanted.aux_hidden_states[real], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            output.last_hidden_state[real], wanted.last_hidden_state[real], rtol=1e-4, atol=1e-4
        )


def test_every_shape_is_compiled_at_the_start_and_nothing_after_it(make_model, trace_only, caplog):
    model = make_model("llama")
    before = num_graphs()
    with caplog.at_level(logging.INFO, "eagle_rpc"):
        target = make_target(model, ["2x12", "2x8"], packed=True)
    assert num_graphs() == before + 4, "all layers of a kind share a graph"
    assert "compiling LlamaDecoderLayer for shape 4 of 4, 2x12 packed" in caplog.text
    for batch, length, packed in ((2, 12, False), (1, 3, True), (7, 8, False), (2, 12, True), (3, 11, True)):
        run(target, batch_of(batch, length, packed=packed))
    assert num_graphs() == before + 4


def test_chats_that_fill_a_row_each_take_the_usual_form(make_model, trace_only):
    target = make_target(make_model("llama"), ["2x8"], packed=True)
    tokens = batch_of(2, 8)
    tokens.attention_mask.fill_(1)
    unpacked = run(target, tokens)
    tokens.segment_ids = torch.tensor([[0], [1]]).expand(2, 8)
    assert torch.equal(run(target, tokens).last_hidden_state, unpacked.last_hidden_state)


def test_packed_chats_are_refused_where_their_form_is_not_compiled(make_model, trace_only):
    with pytest.raises(
        InvalidRequest, match=r"segment_ids must be absent where target\.compile_packed is false"
    ):
        run(make_target(make_model("llama"), ["2x12"]), batch_of(2, 12, packed=True))


def test_what_would_compile_again_is_an_error_and_the_target_lives_on(make_model, trace_only):
    model = make_model("llama")
    target = make_target(model, ["2x12"])
    model.double()
    with pytest.raises(TargetFailed, match="met an input that it was not compiled for"):
        run(target, batch_of(2, 12))
    model.float()
    assert run(target, batch_of(2, 12)).last_hidden_state.shape == (2, 12, 32)


def test_layers_that_do_not_compile_whole_are_refused(make_model, trace_only, monkeypatch):
    model = make_model("llama")

    def break_graph(layer, hidden_states, **unused):
        torch._dynamo.graph_break()
        return hidden_states

    monkeypatch.setattr(type(model.model.layers[0]), "forward", break_graph)
    with pytest.raises(UnsupportedTarget, match="LlamaDecoderLayer must compile whole"):
        make_target(model, ["2x12"])


def test_more_kinds_of_layers_than_can_be_waited_for_are_refused(make_model, trace_only):
    model = make_model("llama")
    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.variance_epsilon = 1e-5 * (number + 1)
    with pytest.raises(UnsupportedTarget, match="alike in all layers"):
        make_target(model, ["2x12"])


def test_the_model_itself_stays_eager_and_whole(make_model, trace_only):
    model = make_model("llama")
    names = list(model.state_dict())
    target = make_target(model, ["2x12"])
    before = num_graphs()
    run(target, batch_of(2, 12))
    model(input_ids=torch.ones(1, 5, dtype=torch.long))
    assert num_graphs() == before
    assert list(model.state_dict()) == names
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model.model.layers)


def test_the_form_and_the_longest_sequence_are_part_of_the_identity(make_model, trace_only):
    eager = HFEagle3TargetModel(make_model("llama")).model_info()
    compiled = make_target(make_model("llama"), ["2x12", "4x8"]).model_info()
    assert (eager.form, eager.max_length) == ("sdpa attention, eager", 64)
    assert (compiled.form, compiled.max_length) == ("sdpa attention, compiled (default) for 4x8 2x12", 12)
    assert compiled.weights_fingerprint == eager.weights_fingerprint


def served_and_colocated(make_loaded, tokens, encoding):
    """The same batch through a server, whose forward passes run in another thread, and in this thread."""
    by_server = served(make_loaded(), CONFIG, MAPPING, encoding, tokens)
    return by_server, supervision_of(colocated(make_loaded(), CONFIG, MAPPING, encoding), tokens)


@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
def test_colocated_and_served_supervision_are_the_same_bits(make_model, encoding, trace_only):
    by_server, here = served_and_colocated(
        lambda: make_target(make_model("llama"), ["2x12"]), batch_of(3, 11), encoding
    )
    assert len(here.supervised_rows) > 10
    assert_same_supervision(by_server, here)


@pytest.mark.slow
@pytest.mark.timeout(600)  # the C++ compiler takes minutes where other work runs beside it
def test_generated_code_gives_the_same_bits_colocated_and_served(tmp_path, monkeypatch):
    """With the compiler that users have, from the configuration, in bf16."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.compiler.reset()
    random = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 7,
    }
    random |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = TargetConfig(
        model="", random=random, dtype=DType.bfloat16, aux_layer_ids=LAYERS, compile_shapes=["2x12"]
    )
    before = num_graphs()
    # Precompiled headers pay off for many kernels, not for two.
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):
        by_server, here = served_and_colocated(
            lambda: HFEagle3TargetModel.load(config, "cpu", cache_dir=tmp_path), batch_of(3, 11), "hidden"
        )
    assert num_graphs() == before + 1
    assert_same_supervision(by_server, here)
    assert any((tmp_path / "compiled").rglob("*.so"))
