"""A target on a GPU: served and co-located supervision are equal bit for bit in every form, and memory stays
within its bound.

Legend: B batch, T sequence, K draft vocab.
"""

import gc

import pytest
import torch
from gpu_marks import ON_A_GPU
from gpu_targets import FORMS, MAPPING, RANDOM, batch_of, config_of
from support.supervised_batches import (
    assert_same_supervision,
    colocated,
    request_for,
    served,
    supervision_of,
)
from torch._dynamo.utils import counters
from transformers import AttentionMaskInterface

from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import (
    DraftVocabOnDevice,
    SessionSpec,
    VocabMapping,
    decode_supervision,
    supervise,
)
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.probes import ROUNDING, relative_error

pytestmark = ON_A_GPU


@pytest.fixture(scope="module", params=FORMS)
def loaded(request, tmp_path_factory):
    config = config_of(request.param)
    yield config, HFEagle3TargetModel.load(config, "cuda", cache_dir=tmp_path_factory.mktemp("cache"))
    torch.compiler.reset()


def open_session(server, encoding, rows="loss_mask", through_host=False):
    spec = SessionSpec(
        selected_token_ids=MAPPING.selected_token_ids, encoding=encoding, rows=rows, through_host=through_host
    )
    return server.open_session(spec).result().id


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
def test_served_and_colocated_supervision_are_the_same_bits(loaded, encoding, packed):
    config, target = loaded
    tokens = batch_of(6, 400, packed=packed)
    by_server = served(target, config, MAPPING, encoding, tokens)
    here = supervision_of(colocated(target, config, MAPPING, encoding), tokens)
    assert len(here.supervised_rows) > 500
    assert_same_supervision(here, by_server)


@pytest.mark.parametrize("through_host", [False, True])
@pytest.mark.parametrize("rows", ["loss_mask", "position_mask"])
def test_replies_made_while_the_next_pass_runs_are_the_same_bits(loaded, rows, through_host):
    """A queue that is never empty, batches of different sizes, and replies that are held until all are there."""
    config, target = loaded
    server = TargetModelServer(target, config)
    session = open_session(server, "logits", rows, through_host)
    batches = [batch_of(4, length, packed=length % 3 == 0) for length in range(200, 500, 25)]
    requests = [request_for(server, session, tokens, number) for number, tokens in enumerate(batches)]
    futures = [server.generate(request) for request in requests]
    replies = [future.result() for future in futures]
    server.close()
    backend = colocated(target, config, MAPPING, "logits", rows)
    for tokens, encoded in zip(batches, replies, strict=True):
        assert encoded.aux.is_cuda is not through_host
        on_gpu = encoded.map_tensors(lambda tensor: tensor.to("cuda"))
        assert_same_supervision(supervision_of(backend, tokens), decode_supervision(on_gpu, tokens, None))


@pytest.mark.parametrize(("window", "head_dim"), [(None, 64), (40, 64), (None, 320)])
def test_packed_chats_are_what_they_are_alone(window, head_dim, tmp_path, monkeypatch):
    """Without a mask, but for chats longer than the sliding window and for heads wider than flash attention takes."""
    shape = {"model_type": "mistral", "sliding_window": window, "head_dim": head_dim}
    target = HFEagle3TargetModel.load(
        config_of("eager", random={**RANDOM, **shape}), "cuda", cache_dir=tmp_path
    )
    tokens, masks = batch_of(3, 300, packed=True), []
    # The first packed batch is preceded by a probe, which also runs chats alone.
    target.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask, tokens.segment_ids)
    mapping = AttentionMaskInterface._global_mapping
    make_mask = mapping["sdpa"]
    monkeypatch.setitem(mapping, "sdpa", lambda **settings: masks.append(settings) or make_mask(**settings))
    packed = target.generate_batch(
        tokens.input_ids, tokens.attention_mask, tokens.loss_mask, tokens.segment_ids
    )
    assert bool(masks) is (window is not None or head_dim > 256)
    for row in range(3):
        length = int(tokens.attention_mask[row].sum())
        for chat in (slice(0, 100), slice(100, length)):
            ids = tokens.input_ids[row : row + 1, chat]
            whole = torch.ones_like(ids)
            alone = target.generate_batch(ids, whole, whole)
            for name in ("aux_hidden_states", "last_hidden_state"):
                error = relative_error(getattr(packed, name)[row : row + 1, chat], getattr(alone, name))
                assert error < ROUNDING[torch.bfloat16], (row, chat, name)


def test_every_form_gives_the_same_distribution_to_rounding(loaded, tmp_path):
    eager = HFEagle3TargetModel.load(config_of("eager"), "cuda", cache_dir=tmp_path)
    tokens, vocab = batch_of(4, 256, device="cuda"), DraftVocabOnDevice.of(MAPPING, torch.device("cuda"))
    plain, other = (
        supervise(target, tokens, vocab, encoding="probs", rows="loss_mask", chunk_rows=300)
        for target in (eager, loaded[1])
    )
    assert float((plain.argmax == other.argmax).float().mean()) > 0.95
    torch.testing.assert_close(other.log_normalizer, plain.log_normalizer, rtol=0, atol=0.1)
    assert float((plain.values - other.values).abs().sum(dim=-1).mean()) < 0.05


def test_nothing_compiles_after_the_start(loaded):
    _, target = loaded
    before = counters["stats"]["unique_graphs"]
    for batch, length, packed in ((4, 512, False), (1, 100, False), (9, 300, True), (4, 256, True)):
        tokens = batch_of(batch, length, packed=packed, device="cuda")
        packing = {"segment_ids": tokens.segment_ids} if packed else {}
        target.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask, **packing)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("encoding", ["logits", "hidden"])
def test_logits_of_one_chunk_are_the_most_that_the_projection_holds(encoding, tmp_path):
    """With a vocabulary so large that whole logits, or a second chunk, would stand out."""
    vocab_size, rows, chunk_rows = 200_000, 8192, 1024
    random = {**RANDOM, "vocab_size": vocab_size}
    config = config_of("fused", random=random, aux_layer_ids=[0, 3, 6])
    target = HFEagle3TargetModel.load(config, "cuda", cache_dir=tmp_path)
    mapping = VocabMapping.from_token_ids(torch.arange(0, vocab_size, 100), vocab_size)
    vocab, tokens = (
        DraftVocabOnDevice.of(mapping, torch.device("cuda")),
        batch_of(16, rows // 16, device="cuda"),
    )

    def run():
        return supervise(target, tokens, vocab, encoding=encoding, rows="loss_mask", chunk_rows=chunk_rows)

    run()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    reply = run()
    chunk = chunk_rows * vocab_size * 2
    others = 3 * reply.num_bytes + rows * 8 * RANDOM["intermediate_size"] * 2
    assert torch.cuda.max_memory_allocated() - before < 1.5 * chunk + others
    assert others < chunk
