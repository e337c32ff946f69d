"""A target over two GPUs: the bits of one, passes that overlap, and nothing that makes the host or a GPU wait."""

from dataclasses import replace

import pytest
import torch
from gpu_marks import ON_TWO_GPUS
from gpu_targets import FORMS, MAPPING, VOCAB, batch_of, config_of, pass_request
from gpu_waits import waiting_forbidden
from support.families import tiny_config, tiny_model
from support.service_training import service_config, take_part
from support.tiny_tokenizer import save_with_tokenizer
from support.workers import run_workers

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.service.forward_pass import ForwardPass
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import (
    ENCODINGS,
    DraftVocabOnDevice,
    GenerateRequest,
    SessionSpec,
    VocabMapping,
    supervise,
)
from eagle_rpc.target.model import HFEagle3TargetModel

pytestmark = ON_TWO_GPUS

DEVICES = ("cuda:0", "cuda:1")
# Cycles of a kernel that does nothing: far longer than the launch of a pass.
_LONG = 2_000_000_000


@pytest.fixture(scope="module", params=FORMS)
def loaded(request, tmp_path_factory):
    """The settings, and the target on one GPU and over two."""
    config, cache = config_of(request.param), tmp_path_factory.mktemp("cache")
    one = HFEagle3TargetModel.load(config, DEVICES[0], cache_dir=cache)
    yield config, one, HFEagle3TargetModel.load(config, *DEVICES, cache_dir=cache)
    torch.compiler.reset()


def supervised(target, tokens, encoding="hidden", mapping=MAPPING):
    vocab = DraftVocabOnDevice.of(mapping, target.devices[-1])
    reply = supervise(target, tokens, vocab, encoding=encoding, rows="loss_mask", chunk_rows=300)
    return reply.map_tensors(lambda tensor: tensor.cpu())


def assert_same_bits(one, other):
    sent = [[], []]
    for encoded, tensors in zip((one, other), sent, strict=True):
        encoded.map_tensors(lambda tensor, tensors=tensors: tensors.append(tensor.view(torch.uint8)))
    assert len(sent[0]) >= 5
    for number, pair in enumerate(zip(*sent, strict=True)):
        assert torch.equal(*pair), number


def settle(forward, request):
    """Passes that fill the caches of memory on GPUs and host with as much as three passes under way need."""
    for _ in range(2):
        for stream in forward._streams:
            # So that none of the passes is over when the last of them starts.
            with torch.cuda.stream(stream):
                torch.cuda._sleep(_LONG // 4)
        for started in [forward.start(request) for _ in range(3)]:
            started.finish()
    for device in DEVICES:
        torch.cuda.synchronize(device)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_two_gpus_give_the_bits_of_one(loaded, encoding, packed):
    _, one, two = loaded
    tokens = batch_of(4, 256, packed=packed)
    before = torch.cuda.current_device()
    assert_same_bits(supervised(two, tokens, encoding), supervised(one, tokens, encoding))
    assert torch.cuda.current_device() == before


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "qwen3_moe"])
def test_stored_families_over_two_gpus_give_the_bits_of_one(family, tmp_path):
    """Read from their files to both GPUs; two of them have heads tied to their embeddings."""
    layers = {"layer_types": None} if family == "gemma3_text" else {}
    save_with_tokenizer(tiny_model(family, num_hidden_layers=6, **layers), tmp_path / "model")
    config = TargetConfig(model=str(tmp_path / "model"), dtype=DType.bfloat16, aux_layer_ids=[0, 2, 4])
    one, two = (
        HFEagle3TargetModel.load(config, *devices, cache_dir=tmp_path) for devices in (DEVICES[:1], DEVICES)
    )
    assert {weight.device.index for weight in two.model.parameters()} == {0, 1}
    assert not any(hasattr(module, "_hf_hook") for module in two.model.modules())
    tokens = batch_of(3, 40)
    tokens = replace(tokens, input_ids=tokens.input_ids % tiny_config(family).vocab_size)
    mapping = VocabMapping.from_token_ids(torch.arange(0, 96, 3), 96)
    assert_same_bits(supervised(two, tokens, mapping=mapping), supervised(one, tokens, mapping=mapping))
    assert two.model_info().weights_fingerprint == one.model_info().weights_fingerprint


@pytest.mark.parametrize("packed", [False, True])
def test_starting_passes_over_two_gpus_never_waits_for_them(loaded, packed):
    config, _, two = loaded
    forward = ForwardPass(two, config)
    request = pass_request(batch_of(4, 256, packed=packed), DEVICES[-1])
    settle(forward, request)
    with waiting_forbidden():
        started = [forward.start(request) for _ in range(3)]
    assert len({tuple(one.finish().argmax.tolist()) for one in started}) == 1


def test_the_first_gpu_works_on_the_next_pass_while_the_second_is_busy(loaded):
    """Without this the passes over two GPUs would take turns, and nothing would tell."""
    config, _, two = loaded
    forward = ForwardPass(two, config)
    request = pass_request(batch_of(4, 256), DEVICES[-1])
    for _ in range(3):
        forward.start(request).finish()
    first, last = forward._streams
    for device in DEVICES:
        torch.cuda.synchronize(device)
    with torch.cuda.stream(last):
        torch.cuda._sleep(_LONG)
    busy = last.record_event()
    started = [forward.start(request) for _ in range(3)]
    own_part_done = first.record_event()
    own_part_done.synchronize()
    # The first GPU has done its part of three passes, and the second has begun none of them.
    assert not busy.query()
    assert len({tuple(one.finish().argmax.tolist()) for one in started}) == 1


def test_replies_of_a_busy_server_over_two_gpus_are_those_of_one(loaded):
    """Batches of several shapes, so that memory is used again while copies are under way."""
    config, one, two = loaded
    batches = [batch_of(4, length, packed=length % 2 == 0) for length in range(200, 500, 13)]
    server = TargetModelServer(two, config)
    assert server.device == torch.device(DEVICES[-1])
    spec = SessionSpec(
        selected_token_ids=MAPPING.selected_token_ids, encoding="logits", rows="loss_mask", through_host=False
    )
    session = server.open_session(spec).result().id
    futures = []
    for number, tokens in enumerate(batches * 2):
        request = GenerateRequest(
            session=session,
            incarnation=server.model_info().incarnation,
            request_id=f"r{number}",
            tokens=tokens,
            seconds_left=60.0,
        )
        futures.append(server.generate(request))
        if len(futures) % 8 == 0:
            futures[-1].result()
    replies = [future.result() for future in futures]
    torch.cuda.synchronize(DEVICES[-1])
    server.close()
    for tokens, reply in zip(batches * 2, replies, strict=True):
        assert reply.aux.device == torch.device(DEVICES[-1])
        on_host = reply.map_tensors(lambda tensor: tensor.cpu())
        assert_same_bits(on_host, supervised(one, tokens, "logits"))


def test_both_gpus_hold_about_half_of_the_weights(loaded):
    _, _, two = loaded
    held = [0, 0]
    for weight in two.model.parameters():
        held[weight.device.index] += weight.numel() * weight.element_size()
    assert max(held) < 0.6 * sum(held) and VOCAB


def test_a_trainer_learns_from_a_target_over_two_gpus_on_the_first_of_them():
    config = service_config("cuda", trainers=1)
    config = replace(
        config,
        topology=replace(config.topology, devices_per_target=2),
        target=replace(config.target, device="auto"),
        train=replace(config.train, device="cuda:0"),
    )
    _, trained = run_workers(take_part, 2, config, 3)
    # The target computes on the trainer's GPU as well.
    assert trained["between_gpus"] == [False]
