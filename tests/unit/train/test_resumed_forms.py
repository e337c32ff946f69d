"""Every form of a draft resumes bit for bit, and its checkpoint reads back as it was exported."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from training_cases import (
    DRAFT_CONFIG,
    HIDDEN,
    OBJECTIVE,
    VOCAB,
    RepeatedPlan,
    assert_same_bits,
    final_state,
    make_trainer,
    random_draft,
    run_record,
    train_config,
    trained_with_a_break,
)

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import Config, RunConfig, ServingConfig
from eagle_rpc.draft import Eagle3Draft
from eagle_rpc.errors import CheckpointError
from eagle_rpc.jobs.export import run as export_job
from eagle_rpc.serving import export_draft, load_export
from eagle_rpc.train.checkpoint import best_checkpoint, latest_checkpoint, read_checkpoint
from eagle_rpc.train.record import plain

SETTINGS = train_config(max_steps=5, accumulation=2, checkpoint_every=2, validate_every=3)
FORMS = {
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "norm_before_fc": {"norm_before_fc": True, "norm_before_residual": True},
    "two_layers_with_a_window": {"num_layers": 2, "sliding_window": 6},
}
EMBEDDING = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))


def trainer_of(path: Path, form: str, **changes):
    draft = Eagle3Draft(replace(DRAFT_CONFIG, **FORMS[form]), EMBEDDING)
    draft.initialise(0)
    parts = {"draft": draft, "record": run_record(SETTINGS, draft_config=draft.config)}
    return make_trainer(path, SETTINGS, **(parts | changes))


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_run_ends_as_one_left_alone_and_exports_its_weights(tmp_path, form):
    straight = trainer_of(tmp_path / "straight", form)
    straight.train()
    resumed = trained_with_a_break(partial(trainer_of, tmp_path / "resumed", form), at=8)
    assert_same_bits(final_state(resumed), final_state(straight))

    checkpoint = read_checkpoint(latest_checkpoint(tmp_path / "resumed" / "checkpoints"))
    export_draft(
        checkpoint.draft_weights,
        checkpoint.record.draft_config,
        checkpoint.record.mapping,
        tmp_path / "export",
        dtype=torch.float32,
        aux_layer_ids=checkpoint.record.target.aux_layer_ids,
        target_embedding=EMBEDDING,
        bos_token_id=None,
        eos_token_id=None,
    )
    read = load_export(tmp_path / "export")
    assert read.config == replace(DRAFT_CONFIG, **FORMS[form])
    draft = read.model()
    assert_same_bits(
        {name: draft.get_parameter(name) for name in checkpoint.draft_weights}, checkpoint.draft_weights
    )


def embedding_trainer(path: Path, **parts):
    settings = train_config(
        max_steps=5, accumulation=2, checkpoint_every=2, validate_every=3, ema_decay=0.5, weight_decay=0.1
    )
    config = plain(Config(train=settings, draft=replace(OBJECTIVE, train_embeddings=True)))
    draft = random_draft()
    draft.train_embeddings()
    return make_trainer(path, settings, draft=draft, record=run_record(settings, config=config), **parts)


def test_a_trained_embedding_resumes_and_is_exported(tmp_path):
    straight = embedding_trainer(tmp_path / "straight")
    straight.train()
    resumed = trained_with_a_break(partial(embedding_trainer, tmp_path / "resumed"), at=8)
    assert_same_bits(final_state(resumed), final_state(straight))
    before = random_draft().embed_tokens.weight
    after = resumed.learner.parameters["embed_tokens.weight"]
    changed = (after != before).any(dim=1)
    assert changed.any()

    checkpoints = tmp_path / "resumed" / "checkpoints"
    assert not (checkpoints / "target_embedding.safetensors").exists()
    run = RunConfig(dir=str(tmp_path / "resumed"))
    serving = ServingConfig(dir=str(tmp_path / "resumed" / "export"), dtype=DType.float32)
    assert export_job(Config(run=run, serving=serving)) == 0
    checkpoint = read_checkpoint(best_checkpoint(checkpoints))
    exported = load_export(tmp_path / "resumed" / "export").weights["embed_tokens.weight"]
    assert torch.equal(exported, checkpoint.state.average["embed_tokens.weight"])


def test_rows_of_tokens_that_never_came_keep_their_embedding(tmp_path):
    learner_draft = random_draft()
    learner_draft.train_embeddings()
    trainer = make_trainer(
        tmp_path, train_config(max_steps=2, weight_decay=0.5), draft=learner_draft, batches=RepeatedPlan()
    )
    trainer.train()
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[RepeatedPlan().batch(0).input_ids.unique()] = True
    before = random_draft().embed_tokens.weight
    assert torch.equal(learner_draft.embed_tokens.weight[~seen], before[~seen])
    assert not torch.equal(learner_draft.embed_tokens.weight[seen], before[seen])


def test_a_run_does_not_go_on_with_another_choice_of_trained_weights(tmp_path):
    embedding_trainer(tmp_path).train()
    with pytest.raises(CheckpointError, match=r"draft\.train_embeddings must be the checkpoint's"):
        make_trainer(tmp_path, train_config(max_steps=9, accumulation=2, ema_decay=0.5)).train()
