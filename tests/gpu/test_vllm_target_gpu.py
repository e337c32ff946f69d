"""A target in vLLM's engine on one GPU and over two, beside transformers on one: in an environment with vLLM."""

import importlib.util

import pytest
import torch
from gpu_marks import ON_A_GPU
from gpu_targets import MAPPING, RANDOM, VOCAB, batch_of
from support.tiny_tokenizer import save_with_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from eagle_rpc.config.choices import DType, TargetEngine
from eagle_rpc.config.schema import TargetConfig, VLLMConfig
from eagle_rpc.service.forward_pass import ForwardPass, PassRequest
from eagle_rpc.service.sessions import Session
from eagle_rpc.supervision import DraftVocabOnDevice, SessionSpec
from eagle_rpc.target.engine_check import state_errors
from eagle_rpc.target.engines import load_any_target

pytestmark = [
    *ON_A_GPU,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM (docs/engines.md)"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    return save_with_tokenizer(LlamaForCausalLM(LlamaConfig(**RANDOM)), path)


@pytest.fixture(scope="module")
def plain(directory, tmp_path_factory):
    config = TargetConfig(model=str(directory), dtype=DType.bfloat16)
    return load_any_target(config, "cuda:0", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    ("devices", "settings"),
    [
        (("cuda:0",), {}),
        (("cuda:0", "cuda:1"), {"tensor_parallel_size": 2}),
        (("cuda:0", "cuda:1"), {"pipeline_parallel_size": 2}),
    ],
    ids=["one", "tensor parallel", "pipeline"],
)
def test_supervision_is_that_of_transformers_to_rounding(plain, directory, tmp_path, devices, settings):
    if len(devices) > torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    vllm = VLLMConfig(gpu_memory_utilization=0.3, **settings)
    config = TargetConfig(model=str(directory), dtype=DType.bfloat16, engine=TargetEngine.vllm, vllm=vllm)
    target = load_any_target(config, *devices, cache_dir=tmp_path)
    tokens = batch_of(4, 256, packed=True)
    arguments = tokens.input_ids, tokens.attention_mask, tokens.loss_mask, tokens.segment_ids
    made, expected = target.generate_batch(*arguments), plain.generate_batch(*arguments)
    real = tokens.attention_mask.bool()
    made_NW, expected_NW = (
        torch.cat((output.aux_hidden_states, output.last_hidden_state), dim=-1)[real.to("cuda:0")]
        for output in (map_to_first(made), expected)
    )
    num_states = len(target.aux_layer_ids) + 1
    assert bool((state_errors(made_NW, expected_NW, num_states) < 0.05).all())
    assert target.get_input_embeddings().weight.shape[0] == VOCAB
    ids_K = DraftVocabOnDevice.of(MAPPING, torch.device(devices[-1])).selected_token_ids
    target.probe_head(ids_K)
    spec = SessionSpec(selected_token_ids=ids_K, encoding="hidden", rows="loss_mask", through_host=False)
    vocab = DraftVocabOnDevice.of(MAPPING, torch.device(devices[-1]))
    session = Session(id="a", spec=spec, mapping_digest=MAPPING.digest, vocab=vocab)
    encoded = ForwardPass(target, config).start(PassRequest(session=session, tokens=tokens)).finish()
    assert str(encoded.aux.device) == devices[-1] and len(encoded.aux) == int(real.sum())


def map_to_first(output):
    output.aux_hidden_states = output.aux_hidden_states.to("cuda:0")
    output.last_hidden_state = output.last_hidden_state.to("cuda:0")
    return output
