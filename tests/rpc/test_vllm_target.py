"""A target in vLLM's engine beside the same model by transformers, in one process and over RPC.

It runs in an environment with vLLM (docs/engines.md): VLLM_ENV/bin/python -m pytest tests/rpc/test_vllm_target.py
"""

import dataclasses
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_target import tensors_of
from support.tiny_tokenizer import save_with_tokenizer
from support.workers import run_workers
from test_service import as_lists, joined, remote_target, serve
from transformers import LlamaConfig, LlamaForCausalLM

from eagle_rpc.config.choices import DType, TargetEngine
from eagle_rpc.config.schema import TargetConfig, TopologyConfig, VLLMConfig
from eagle_rpc.errors import TargetLost, UnsupportedTarget
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import (
    ENCODINGS,
    GenerateRequest,
    SessionSettings,
    SessionSpec,
    TokenBatch,
    VocabMapping,
)
from eagle_rpc.target import vllm_target
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.engines import load_any_target
from eagle_rpc.target.vllm_engine import HiddenStates
from eagle_rpc.topology import Role

pytestmark = [
    pytest.mark.rpc,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="needs an environment with vLLM (docs/engines.md)"
    ),
]

VOCAB_SIZE, LENGTH = 300, 48
AUX = [1, 3, 5]


def assert_close(made: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Of fp32 by other kernels; states of this size have some 1e-6."""
    told = {"rtol": 1e-3, "atol": 1e-4, "msg": lambda text: f"{name}: {text}"}
    torch.testing.assert_close(made, expected, **told)


def save_model(directory: Path) -> Path:
    """A Llama whose heads are as wide as vLLM's attention on a CPU takes them, with sharp attention."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 6, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return save_with_tokenizer(
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)), directory
    )


def config_of(directory: str | Path, engine: TargetEngine, **settings: Any) -> TargetConfig:
    # Fewer tokens a step than a chat has: the engine reads each chat in parts.
    vllm = VLLMConfig(kv_cache_gib=0.25, max_batched_tokens=64, **settings)
    exact = {"dtype": DType.float32, "device": "cpu", "aux_layer_ids": AUX, "max_length": 64}
    return TargetConfig(model=str(directory), engine=engine, vllm=vllm, **exact)


def mapping() -> VocabMapping:
    ids = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(5))[:90]
    return VocabMapping.from_token_ids(ids, VOCAB_SIZE)


def tokens_of(seed: int, *, packed: bool) -> TokenBatch:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, LENGTH + 1, (4, 1), generator=draw)
    real = torch.arange(LENGTH)[None] < lengths
    ids = torch.randint(0, VOCAB_SIZE, (4, LENGTH), generator=draw)
    supervised = real & (torch.rand(4, LENGTH, generator=draw) < 0.7)
    segments = (torch.rand(4, LENGTH, generator=draw) < 0.1).long().cumsum(dim=1) if packed else None
    return TokenBatch(
        input_ids=ids, attention_mask=real.long(), loss_mask=supervised.long(), segment_ids=segments
    )


def batches() -> list[TokenBatch]:
    return [tokens_of(seed, packed=packed) for seed in range(3) for packed in (False, True)]


def supervision(target: Any, encoding: str) -> list[dict[str, torch.Tensor]]:
    config = config_of("any", TargetEngine.vllm)
    backend = ColocatedEagle3TargetModel(target, config, SessionSettings(encoding=encoding, rows="loss_mask"))
    backend.open_session(mapping())
    return [tensors_of(batch) for batch in backend.stream(batches())]


@dataclasses.dataclass(frozen=True)
class Both:
    directory: Path
    transformers: Any
    vllm: Any


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Iterator[Both]:
    root = tmp_path_factory.mktemp("engine")
    directory = save_model(root / "model")
    # vLLM changes classes of transformers: the model by transformers comes first.
    config = config_of(directory, TargetEngine.transformers)
    plain = load_any_target(config, "cpu", cache_dir=root / "cache")
    config = config_of(directory, TargetEngine.vllm)
    yield Both(directory, plain, load_any_target(config, "cpu", cache_dir=root / "cache"))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_supervision_of_padded_and_packed_rows_equals_that_of_transformers(both, encoding):
    pairs = zip(supervision(both.vllm, encoding), supervision(both.transformers, encoding), strict=True)
    for made, expected in pairs:
        assert made.keys() == expected.keys()
        for name in made:
            assert_close(made[name], expected[name], name)


def test_a_target_says_what_it_is_and_that_its_bits_are_its_own(both):
    made, expected = both.vllm.model_info(), both.transformers.model_info()
    for name in "architecture vocab_size hidden_size num_layers aux_layer_ids dtype max_length".split():
        assert getattr(made, name) == getattr(expected, name), name
    assert made.tokenizer_fingerprint == expected.tokenizer_fingerprint
    assert made.form.startswith("vLLM ") and made.form.endswith("equal to rounding")
    assert torch.equal(
        both.vllm.get_input_embeddings().weight, both.transformers.get_input_embeddings().weight
    )


def test_the_forward_thread_of_a_server_asks_the_engine(both, monkeypatch):
    asked = []
    ask = HiddenStates.of_prompts

    def noted(engine, prompts):
        asked.append(threading.current_thread().name)
        return ask(engine, prompts)

    monkeypatch.setattr(HiddenStates, "of_prompts", noted)
    server = TargetModelServer(both.vllm, config_of(both.directory, TargetEngine.vllm))
    try:
        opened = server.open_session(SessionSpec(selected_token_ids=mapping().selected_token_ids)).result(60)
        request = GenerateRequest(
            session=opened.id,
            incarnation=server.model_info().incarnation,
            request_id="a",
            tokens=tokens_of(0, packed=False),
            seconds_left=60.0,
        )
        assert server.generate(request).result(60).supervised_rows.numel()
        assert set(asked) == {"forward"}
    finally:
        assert server.close()


def test_an_engine_that_captures_other_layers_is_refused(both, tmp_path, monkeypatch):
    class Shifted(HiddenStates):
        def __init__(self, config, model, devices):
            super().__init__(config, dataclasses.replace(model, aux_layer_ids=(0, 2, 4)), devices)

    monkeypatch.setattr(vllm_target, "HiddenStates", Shifted)
    with pytest.raises(UnsupportedTarget, match="must give the hidden states of transformers to rounding"):
        load_any_target(
            config_of(both.directory, TargetEngine.vllm), "cpu", cache_dir=both.directory.parent / "cache"
        )


def stream_over_rpc(directory: str, cache_dir: str) -> Any:
    with joined(TopologyConfig()) as membership:
        if membership.cast.me.has(Role.target):
            config = config_of(directory, TargetEngine.vllm)
            return serve(membership, load_any_target(config, "cpu", cache_dir=cache_dir))
        membership.wait_for(membership.cast.target_names, "ready", timeout=400)
        backend = remote_target(membership, encoding="hidden", request_timeout=60.0)
        backend.open_session(mapping())
        received = [as_lists(tensors_of(batch)) for batch in backend.stream(batches())]
        backend.close()
        membership.mark("done")
        return received


def test_a_trainer_receives_the_same_over_rpc(both):
    cache = both.directory.parent / "cache"
    counts, received = run_workers(stream_over_rpc, 2, str(both.directory), str(cache), timeout=500)
    assert counts == {"ok": len(batches())}
    config = config_of(both.directory, TargetEngine.transformers)
    backend = ColocatedEagle3TargetModel(both.transformers, config, SessionSettings(encoding="hidden"))
    backend.open_session(mapping())
    for made, batch in zip(received, backend.stream(batches()), strict=True):
        for name, expected in tensors_of(batch).items():
            found = torch.tensor(made[name], dtype=expected.dtype)
            assert_close(found, expected, name)


def test_a_failed_engine_is_lost_for_good(both, monkeypatch):
    engine = both.vllm._engine
    monkeypatch.setattr(engine, "_lost", None)
    with pytest.raises(TargetLost, match="vLLM failed in a pass"):
        engine.of_prompts([[0] * 65])
    with pytest.raises(TargetLost, match="vLLM failed in a pass"):
        engine.of_prompts([[1, 2]])
