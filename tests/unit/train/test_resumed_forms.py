"""Every form of a draft resumes bit for bit, and its checkpoint reads back as it was exported."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_cases import (
    DRAFT_CONFIG,
    HIDDEN,
    VOCAB,
    TableTarget,
    assert_same_bits,
    final_state,
    make_trainer,
    run_record,
    train_config,
)

from eagle_rpc.draft import Eagle3Draft
from eagle_rpc.serving import export_draft, load_export
from eagle_rpc.train.checkpoint import latest_checkpoint, read_checkpoint

SETTINGS = train_config(max_steps=5, accumulation=2, checkpoint_every=2, validate_every=3)
FORMS = {
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "norm_before_fc": {"norm_before_fc": True, "norm_before_residual": True},
    "two_layers_with_a_window": {"num_layers": 2, "sliding_window": 6},
}
EMBEDDING = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))


class InterruptedTarget(TableTarget):
    def deliver(self, tokens):
        if self.batches_delivered == 8:
            raise InterruptedError
        return super().deliver(tokens)


def trainer_of(path: Path, form: str, **changes):
    draft = Eagle3Draft(replace(DRAFT_CONFIG, **FORMS[form]), EMBEDDING)
    draft.initialise(0)
    parts = {"draft": draft, "record": run_record(SETTINGS, draft_config=draft.config)}
    return make_trainer(path, SETTINGS, **(parts | changes))


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_run_ends_as_one_left_alone_and_exports_its_weights(tmp_path, form):
    straight = trainer_of(tmp_path / "straight", form)
    straight.train()
    with pytest.raises(InterruptedError):
        trainer_of(tmp_path / "resumed", form, target=InterruptedTarget()).train()
    resumed = trainer_of(tmp_path / "resumed", form)
    resumed.train()
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
