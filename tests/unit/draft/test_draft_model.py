import pytest
import torch
from draft_cases import DRAFT_VOCAB, HIDDEN, VOCAB, random_chat, tiny_config, tiny_draft
from support.ttt_cases import every_slot

from eagle_rpc.draft import DraftCache, Eagle3Draft
from eagle_rpc.errors import ConfigError

# Names and shapes that serving engines read; H 12, 4 heads and 2 key heads of 6, intermediate 20, V 23, K 11.
GOLDEN = {
    "embed_tokens.weight": (23, 12),
    "fc.weight": (12, 36),
    "midlayer.hidden_norm.weight": (12,),
    "midlayer.input_layernorm.weight": (12,),
    "midlayer.post_attention_layernorm.weight": (12,),
    "midlayer.self_attn.q_proj.weight": (24, 24),
    "midlayer.self_attn.k_proj.weight": (12, 24),
    "midlayer.self_attn.v_proj.weight": (12, 24),
    "midlayer.self_attn.o_proj.weight": (12, 24),
    "midlayer.mlp.gate_proj.weight": (20, 12),
    "midlayer.mlp.up_proj.weight": (20, 12),
    "midlayer.mlp.down_proj.weight": (12, 20),
    "norm.weight": (12,),
    "lm_head.weight": (11, 12),
}


def test_state_dict_has_the_exported_names_and_shapes():
    assert {name: tuple(tensor.shape) for name, tensor in tiny_draft().state_dict().items()} == GOLDEN


def test_further_layers_are_plain_llama_layers():
    draft = tiny_draft(num_layers=3)
    names = {name.removeprefix("layers.2.") for name in draft.state_dict() if name.startswith("layers.2.")}
    first = {name.removeprefix("midlayer.") for name in GOLDEN if name.startswith("midlayer.")}
    assert names == first - {"hidden_norm.weight"}
    assert draft.layers["1"].self_attn.q_proj.weight.shape == (24, 12)


def test_norms_before_the_projection_have_the_names_that_engines_load():
    draft = tiny_draft(norm_before_fc=True, fc_norm=True, norm_output=True)
    added = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items() if name not in GOLDEN}
    assert added == {"input_norm.weight": (36,)} | {f"fc_norm.{place}.weight": (12,) for place in range(3)}


def test_only_the_embedding_is_frozen_and_copied_only_to_be_trained():
    embedding = torch.randn(VOCAB, HIDDEN)
    draft = Eagle3Draft(tiny_config(), embedding)
    assert [name for name, parameter in draft.named_parameters() if not parameter.requires_grad] == [
        "embed_tokens.weight"
    ]
    assert draft.embed_tokens.weight.data_ptr() == embedding.data_ptr()
    draft.train_embeddings()
    assert torch.equal(draft.embed_tokens.weight, embedding)
    assert draft.embed_tokens.weight.data_ptr() != embedding.data_ptr()


def test_an_embedding_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"input_embeddings must have shape \[23, 12\], got \[12, 23\]"):
        Eagle3Draft(tiny_config(), torch.zeros(HIDDEN, VOCAB))


def test_initialisation_follows_the_seed_alone():
    drafts = [Eagle3Draft(tiny_config(), torch.zeros(VOCAB, HIDDEN)) for _ in range(3)]
    for draft, seed in zip(drafts, (5, 5, 6), strict=True):
        torch.rand(7)
        draft.initialise(seed)
    first, second, other = (draft.state_dict() for draft in drafts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    assert torch.equal(first["norm.weight"], torch.ones(HIDDEN))
    assert first["fc.weight"].std().item() == pytest.approx(0.02, rel=0.2)


def test_the_head_can_start_from_the_targets_rows():
    draft, rows = tiny_draft(), torch.randn(DRAFT_VOCAB, HIDDEN)
    draft.seed_lm_head(rows)
    assert torch.equal(draft.lm_head.weight, rows.double())
    assert draft.lm_head.weight.requires_grad
    with pytest.raises(ConfigError, match="weight_KH must have shape"):
        draft.seed_lm_head(rows.T)


def test_a_cast_draft_keeps_its_rotary_frequencies():
    positions = torch.tensor([[0, 1, 50]])
    exact, cast = tiny_draft(torch.float32), tiny_draft(torch.bfloat16)
    assert all(map(torch.equal, exact.rotary.tables(positions), cast.rotary.tables(positions)))


def unrolled(draft, ids_BT, aux_BT3H, steps):
    """TTT outputs of every step; slots near the end read the filler id 0."""
    memory = draft.unroll_memory(every_slot(ids_BT.shape[1]))
    positions = torch.arange(ids_BT.shape[1])[None]
    hidden, outputs = draft.fuse(aux_BT3H), []
    for step in range(steps):
        ids = torch.nn.functional.pad(ids_BT[:, step + 1 :], (0, step + 1))
        output = draft.advance(ids, hidden, positions + step, memory)
        outputs.append(output)
        hidden = draft.carried(output)
    return outputs


FORMS = {
    "eagle3": {},
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "two_layers": {"num_layers": 2},
    "window": {"sliding_window": 4, "num_layers": 2},
    "window_shorter_than_the_steps": {"sliding_window": 2},
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_decoding_equals_training(form):
    """Step 0 in one call, in pieces, and chains of guesses at every slot, on the same tokens."""
    draft, chat, steps = tiny_draft(**FORMS[form]), random_chat(9, [1], seed=0), 4
    ids, aux = chat["ids"][None], chat["aux"][None]
    outputs = unrolled(draft, ids, aux, steps)
    trained = [draft.carried(output) for output in outputs]
    fused = draft.fuse(aux)
    whole, logits = draft.decode_step(ids[:, 1:], fused[:, :-1], draft.new_cache())
    torch.testing.assert_close(whole, trained[0][:, :-1])
    torch.testing.assert_close(logits, draft.lm_head(draft.norm(outputs[0][:, -2])))

    cache, slot = draft.new_cache(), 0
    for piece in (1, 3, 1):
        output, _ = draft.decode_step(
            ids[:, slot + 1 : slot + 1 + piece], fused[:, slot : slot + piece], cache
        )
        torch.testing.assert_close(output, trained[0][:, slot : slot + piece])
        slot += piece
        last, hidden = slot - 1, output[:, -1:]
        for step in range(1, steps):
            hidden, _ = draft.decode_step(ids[:, last + step + 1 : last + step + 2], hidden, cache)
            torch.testing.assert_close(hidden[:, 0], trained[step][:, last])
        assert cache.length == slot + steps - 1
        cache.truncate(slot)


def test_a_cache_cannot_be_truncated_to_more_than_it_holds():
    with pytest.raises(AssertionError, match=r"length must lie in \[0, 0\], got 1"):
        DraftCache().truncate(1)


def test_norms_are_computed_in_fp32():
    norm = tiny_draft(torch.bfloat16).norm
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), wide.bfloat16() * norm.weight)


@torch.no_grad()
def test_an_embedding_in_the_targets_dtype_is_computed_with_in_the_drafts():
    embedding = torch.randn(VOCAB, HIDDEN).bfloat16()
    outputs = []
    for table in (embedding, embedding.float()):
        draft = Eagle3Draft(tiny_config(), table)
        draft.initialise(0)
        aux = torch.randn(1, 4, 3 * HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
        outputs.append(draft.decode_step(torch.tensor([[1, 2, 3, 4]]), draft.fuse(aux), DraftCache())[0])
    assert outputs[0].dtype == torch.float32
    assert torch.equal(*outputs)
