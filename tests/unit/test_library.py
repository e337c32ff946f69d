"""The names of `import eagle_rpc`, with a tiny random target in this process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_target import (
    DRAFT_VOCAB_SIZE,
    TINY_LLAMA,
    tensors_of,
    tiny_batch,
    tiny_mapping,
    tiny_target_config,
)

import eagle_rpc
from eagle_rpc import library
from eagle_rpc.errors import CheckpointError, ConfigError, InvalidRequest, TargetMismatch, TrainingDiverged
from eagle_rpc.registry import load_or_create_token
from eagle_rpc.rpc import elastic
from eagle_rpc.supervision import SessionSettings
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

TARGET = tiny_target_config()
TRAIN = eagle_rpc.TrainConfig(max_steps=20, learning_rate=1e-2, device="cpu", autocast=None)
DRAFT = eagle_rpc.DraftConfig(ttt_steps=3)


def make_training(*, target=TARGET, mapping=None, **train):
    return eagle_rpc.DraftTraining(
        eagle_rpc.load_target(TARGET),
        mapping or tiny_mapping(),
        target=target,
        draft=DRAFT,
        train=replace(TRAIN, **train),
    )


def test_each_name_of_the_library_is_one_of_the_package():
    for name in library.__all__:
        assert getattr(eagle_rpc, name) is getattr(library, name)
    assert set(library.__all__) <= set(dir(eagle_rpc))


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = eagle_rpc.Trainer


@pytest.mark.parametrize("devices_per_target", [1, 2])
def test_a_loaded_target_answers_as_the_backend_of_the_jobs_does(devices_per_target):
    mine = eagle_rpc.load_target(
        TARGET,
        supervision=eagle_rpc.SupervisionConfig(encoding=eagle_rpc.Encoding.logits),
        devices_per_target=devices_per_target,
    )
    theirs = ColocatedEagle3TargetModel(
        HFEagle3TargetModel.load(TARGET, "cpu", cache_dir="unused", seed=0),
        TARGET,
        SessionSettings(encoding="logits"),
    )
    batch = tiny_batch(1)
    answers = []
    for target in (mine, theirs):
        target.open_session(tiny_mapping())
        answers.append(tensors_of(next(target.stream([batch]))))
    for name, tensor in answers[0].items():
        assert torch.equal(tensor, answers[1][name]), name


def test_a_target_on_no_device_is_refused():
    with pytest.raises(ConfigError, match="devices_per_target must be at least 1, got 0"):
        eagle_rpc.load_target(TARGET, devices_per_target=0)


def test_training_takes_a_step_for_each_accumulated_batch_and_one_for_the_rest():
    training = make_training(accumulation=2)
    figures = list(training.steps(tiny_batch(seed) for seed in range(5)))
    assert [one.step for one in figures] == [1, 2, 3]
    assert all(len(one.accuracy) == DRAFT.ttt_steps and one.supervised_tokens > 0 for one in figures)


def test_training_continues_where_the_last_call_ended_and_stops_at_its_last_step():
    at_once, in_two = make_training(max_steps=3), make_training(max_steps=3)
    batches = [tiny_batch(seed) for seed in range(5)]
    expected = list(at_once.steps(batches))
    assert list(in_two.steps(batches[:2])) + list(in_two.steps(batches[2:])) == expected
    assert [one.step for one in expected] == [1, 2, 3]
    assert list(at_once.steps(batches)) == []


def test_training_on_one_batch_lowers_its_loss():
    losses = [figures.loss for figures in make_training().steps([tiny_batch(1)] * 20)]
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_ends_training():
    training = make_training(learning_rate=1e30, warmup_share=0.0)
    with pytest.raises(TrainingDiverged, match="must be finite, got nan"):
        list(training.steps([tiny_batch(1)] * 20))


def test_a_loss_that_needs_logits_refuses_the_encoding_probs():
    asked = eagle_rpc.SupervisionConfig(encoding=eagle_rpc.Encoding.probs)
    backend = eagle_rpc.load_target(TARGET, supervision=asked)
    draft = replace(DRAFT, loss=eagle_rpc.DraftLoss.lk_alpha, seed_head=False)
    training = eagle_rpc.DraftTraining(backend, tiny_mapping(), target=TARGET, draft=draft, train=TRAIN)
    with pytest.raises(ConfigError, match=r"draft\.loss=lk_alpha must not go with"):
        list(training.steps([tiny_batch(1)]))


def test_the_draft_vocabulary_follows_from_the_mapping():
    assert make_training().draft.config.draft_vocab_size == DRAFT_VOCAB_SIZE
    small = eagle_rpc.VocabMapping.from_token_ids(torch.arange(10), 90)
    with pytest.raises(InvalidRequest, match="made for 96 target tokens"):
        make_training(mapping=small)


def test_training_refuses_a_backend_of_another_target():
    other = replace(TARGET, random={**TINY_LLAMA, "hidden_size": 64})
    with pytest.raises(TargetMismatch, match="hidden_size must be 64"):
        make_training(target=other)


def test_an_exported_draft_has_the_trained_weights(tmp_path: Path):
    training = make_training()
    list(training.steps([tiny_batch(1)] * 2))
    files = training.export(tmp_path / "draft", dtype=eagle_rpc.DType.float32)
    assert [file.name for file in files] == ["config.json", "model.safetensors", "README.md"]
    draft = eagle_rpc.load_draft(tmp_path / "draft")
    assert draft.mapping.digest == tiny_mapping().digest
    assert draft.aux_layer_ids == (0, 2, 4)
    trained = training.draft.state_dict()
    for name, tensor in draft.model().state_dict().items():
        assert torch.equal(tensor, trained[name]), name


def test_an_exported_draft_is_evaluated_on_token_ids(tmp_path: Path):
    make_training().export(tmp_path / "draft")
    settings = eagle_rpc.EvaluateConfig(max_new_tokens=8, num_draft_tokens=2)
    draft = eagle_rpc.load_draft(str(tmp_path / "draft"))
    result = eagle_rpc.evaluate_draft(TARGET, draft, [[1, 2, 3], [4, 5]], settings=settings)
    assert (result.num_prompts, result.num_tokens, result.differing_texts) == (2, 16, 0)
    assert len(result.acceptance_per_position) == 2 and result.settings["dtype"] == "float32"


def test_all_mistakes_are_reported_at_once():
    wrong = eagle_rpc.TargetConfig(chunk_rows=0, max_sessions=-1)
    with pytest.raises(ConfigError) as raised:
        eagle_rpc.load_target(wrong)
    for setting in ("target.model must be given", "target.chunk_rows must", "target.max_sessions must"):
        assert setting in str(raised.value)


def test_choices_may_be_given_by_name():
    by_name = eagle_rpc.load_target(replace(TARGET, dtype="float32"))  # type: ignore[arg-type]
    assert by_name.model_info().dtype == "float32"
    with pytest.raises(ConfigError, match=r"target\.dtype"):
        eagle_rpc.load_target(replace(TARGET, dtype="float31"))  # type: ignore[arg-type]


def test_a_process_joins_rpc_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(elastic, "_memberships", ["of an earlier call"])
    token_file = str(tmp_path / "token")
    load_or_create_token(Path(token_file))
    rpc = eagle_rpc.RpcConfig(token_file=token_file)
    with (
        pytest.raises(ConfigError, match="trainer0 must join RPC in a process of its own"),
        eagle_rpc.connect(eagle_rpc.RunConfig(name="test"), rpc=rpc),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="target3 must join RPC in a process of its own"),
        eagle_rpc.serve(TARGET, rpc=rpc, index=3, host_registry=False),
    ):
        pass


def test_training_starts_from_an_exported_draft_as_if_it_had_never_ended(tmp_path):
    first = make_training()
    list(first.steps([tiny_batch(1)] * 20))
    first.export(tmp_path / "draft", dtype=eagle_rpc.DType.float32)
    warm = replace(DRAFT, init_from=str(tmp_path / "draft"))
    second = eagle_rpc.DraftTraining(
        eagle_rpc.load_target(TARGET), tiny_mapping(), target=TARGET, draft=warm, train=TRAIN
    )
    for name, tensor in first.draft.state_dict().items():
        assert torch.equal(second.draft.state_dict()[name], tensor), name
    (cold,), (continued,) = make_training().steps([tiny_batch(1)]), second.steps([tiny_batch(1)])
    assert continued.loss < cold.loss


def test_a_draft_of_another_target_is_no_start(tmp_path):
    make_training().export(tmp_path / "draft")
    other = tiny_target_config(aux_layer_ids=[0, 2, 5])
    draft = replace(DRAFT, init_from=str(tmp_path / "draft"))
    with pytest.raises(CheckpointError, match=r"target\.aux_layer_ids must be \[0, 2, 4\]"):
        eagle_rpc.DraftTraining(eagle_rpc.load_target(other), tiny_mapping(), target=other, draft=draft)
