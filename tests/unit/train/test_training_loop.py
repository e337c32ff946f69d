import json
from dataclasses import replace

import pytest
import torch
from training_cases import (
    OBJECTIVE,
    TARGET_INFO,
    RandomPlan,
    RepeatedPlan,
    TableTarget,
    final_state,
    make_trainer,
    random_draft,
    run_record,
    train_config,
)

from eagle_rpc.config.choices import Resume
from eagle_rpc.errors import ConfigError, TrainingDiverged
from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.train.checkpoint import latest_checkpoint, read_checkpoint
from eagle_rpc.train.schedule import planned_steps


def lines_of(path):
    return list(read_metrics(path / "metrics.jsonl"))


def test_training_lowers_the_loss_and_raises_the_accept_length(tmp_path):
    settings = train_config(max_steps=60, learning_rate=3e-2, log_every=5, validate_every=0)
    make_trainer(tmp_path, settings, batches=RepeatedPlan(batch_size=4)).train()
    training = [line for line in lines_of(tmp_path) if "loss" in line]
    assert [line["step"] for line in training] == list(range(5, 61, 5))
    assert training[-1]["loss"] < training[0]["loss"] - 1.0
    assert training[-1]["simulated_accept_length"] > training[0]["simulated_accept_length"]


def test_figures_come_at_their_steps_and_at_the_end(tmp_path):
    make_trainer(tmp_path, train_config(max_steps=7)).train()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 7]
    assert [line["step"] for line in lines if "validation/loss" in line] == [4, 7]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept in (["step_4", "step_6", "step_7"], ["step_6", "step_7"])  # 4 only if it is the best
    line = lines[0]
    assert len(line["accuracy"]) == len(line["simulated_acceptance_per_position"]) == OBJECTIVE.ttt_steps
    shares = line["simulated_acceptance_per_position"]
    assert line["simulated_accept_length"] == pytest.approx(1 + sum(shares))
    assert line["tokens_per_second"] > 0 and line["grad_norm"] > 0 and 0 <= line["wait_share"] <= 1


def test_each_trainer_tells_where_its_time_went(tmp_path):
    trainer = make_trainer(tmp_path, train_config(max_steps=4))
    assert not trainer.has_trained
    trainer.train()
    (seconds,) = trainer.times
    *waits, judging, training = seconds
    assert trainer.has_trained and len(waits) == 3 and judging > 0 and training > 0


def test_token_counts_are_those_of_the_batches(tmp_path):
    make_trainer(tmp_path, train_config(max_steps=2, log_every=2, validation_batches=0)).train()
    (line,) = lines_of(tmp_path)
    plan = RandomPlan()
    assert line["supervised_tokens"] == sum(int(plan.batch(i).loss_mask.sum()) for i in range(2))


def test_accumulation_gives_the_gradient_of_one_large_batch(tmp_path):
    whole = make_trainer(tmp_path / "whole", train_config(autocast=None))
    parts = make_trainer(tmp_path / "parts", train_config(autocast=None))
    target, plan = TableTarget(), RandomPlan(batch_size=4)
    tokens = plan.batch(0)
    halves = [
        replace(
            tokens,
            **{name: getattr(tokens, name)[rows] for name in ("input_ids", "attention_mask", "loss_mask")},
        )
        for rows in (slice(0, 1), slice(1, 4))
    ]
    one = whole.learner.learn([target.supervise(tokens)])
    two = parts.learner.learn([target.supervise(half) for half in halves])
    torch.testing.assert_close(two.grad_norm, one.grad_norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(two.sums.flat, one.sums.flat, rtol=1e-6, atol=0)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    trainer = make_trainer(tmp_path, train_config(max_grad_norm=1e-3, autocast=None))
    outcome = trainer.learner.learn([TableTarget().supervise(RandomPlan().batch(0))])
    gradients = torch.cat([parameter.grad.flatten() for parameter in trainer.learner.parameters.values()])
    assert outcome.grad_norm > 1e-2
    torch.testing.assert_close(gradients.norm(), torch.tensor(1e-3))


def test_the_frozen_embedding_does_not_change(tmp_path):
    draft = random_draft()
    before = draft.embed_tokens.weight.clone()
    make_trainer(tmp_path, train_config(max_steps=2, weight_decay=0.5), draft=draft).train()
    assert torch.equal(draft.embed_tokens.weight, before)


def test_validation_changes_nothing_that_training_uses(tmp_path):
    states = []
    for every in (1, 0):
        trainer = make_trainer(tmp_path / str(every), train_config(max_steps=4, validate_every=every))
        trainer.train()
        states.append(final_state(trainer))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_every_stream_is_closed_when_training_ends_and_when_it_fails(tmp_path):
    target = TableTarget()
    make_trainer(tmp_path / "good", train_config(max_steps=4), target=target).train()
    assert target.open_streams == 0

    class Failing(TableTarget):
        def deliver(self, tokens):
            if self.batches_delivered == 5:
                raise ConnectionError("gone")
            return super().deliver(tokens)

    failing = Failing()
    with pytest.raises(ConnectionError):
        make_trainer(tmp_path / "bad", train_config(), target=failing).train()
    assert failing.open_streams == 0


def test_prefetched_batches_do_not_count_as_consumed(tmp_path):
    make_trainer(tmp_path, train_config(max_steps=3, accumulation=2, checkpoint_every=3)).train()
    assert read_checkpoint(latest_checkpoint(tmp_path / "checkpoints")).sequences == 12


class PoisonedTarget(TableTarget):
    """Its hidden states are not a number in one micro-batch."""

    def __init__(self, poisoned: int) -> None:
        super().__init__()
        self._poisoned = poisoned

    def deliver(self, tokens):
        batch = super().deliver(tokens)
        if self.batches_delivered == self._poisoned:
            batch.aux_hidden_states = batch.aux_hidden_states * float("nan")
        return batch


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize(
    ("dtype", "advice"),
    [("float16", "use target.dtype=bfloat16"), ("bfloat16", "its weights may be damaged")],
)
def test_supervision_that_is_not_finite_stops_before_a_checkpoint(tmp_path, log_every, dtype, advice):
    settings = train_config(max_steps=9, log_every=log_every, validation_batches=0)
    record = run_record(settings, target=replace(TARGET_INFO, dtype=dtype))
    with pytest.raises(TrainingDiverged, match=rf"supervision must be finite, .* in {dtype}: {advice}"):
        make_trainer(tmp_path, settings, target=PoisonedTarget(5), record=record).train()
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step_3"
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, train_config(max_steps=3, validation_batches=0))
    with torch.no_grad():
        trainer.learner.parameters["norm.weight"][0] = float("inf")
    with pytest.raises(
        TrainingDiverged, match=r"loss or gradient norm .* train\.learning_rate may be too high"
    ):
        trainer.train()
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_weights_that_are_not_finite_stop_before_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, train_config(max_steps=3, validation_batches=0))
    learn = trainer.learner.learn

    def learn_and_overflow(batches):
        outcome = learn(batches)
        if trainer.learner.steps_done == 3:
            with torch.no_grad():
                trainer.learner.parameters["norm.weight"][0] = float("inf")
        return outcome

    trainer.learner.learn = learn_and_overflow
    with pytest.raises(TrainingDiverged, match="weights"):
        trainer.train()
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_epochs_end_the_run_early():
    five = RandomPlan(batches_per_epoch=5)
    assert planned_steps(train_config(max_steps=100), five) == 100
    assert planned_steps(train_config(max_steps=100, max_epochs=3, accumulation=2), five) == 8
    assert planned_steps(train_config(max_steps=4, max_epochs=3), five) == 4


def test_another_number_of_trainers_finishes_the_epochs_that_the_others_began():
    config = train_config(max_steps=100, max_epochs=3)
    one, three = RandomPlan(batches_per_epoch=12), RandomPlan(size=3, batches_per_epoch=4)
    assert one.sequences_per_epoch == three.sequences_per_epoch == 24
    assert planned_steps(config, one) == 36
    assert planned_steps(config, three, steps_done=6, position=12) == 6 + 10


def test_a_draft_of_another_dtype_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"fc\.weight must be float32 for training, got torch\.bfloat16"):
        make_trainer(tmp_path, train_config(), draft=random_draft().bfloat16())


def test_without_resume_a_checkpoint_is_not_read(tmp_path):
    make_trainer(tmp_path, train_config(max_steps=3)).train()
    trainer = make_trainer(tmp_path, train_config(max_steps=3, resume=Resume.never))
    trainer._start()
    assert trainer.learner.steps_done == 0


def test_metrics_are_json_without_extensions(tmp_path):
    make_trainer(tmp_path, train_config(max_steps=2)).train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert records and all("step" in record for record in records)
