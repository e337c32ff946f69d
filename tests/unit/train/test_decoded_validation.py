"""The accept length of a validation is that of an evaluation of the same prompts."""

import threading

import pytest
import torch
from support.tiny_target import tiny_target_config
from training_cases import train_config

import eagle_rpc
from eagle_rpc.config.schema import Config, DraftConfig, EvaluateConfig, ServingConfig
from eagle_rpc.data import BatchPlan, ChatDataset, Example
from eagle_rpc.draft import TargetText
from eagle_rpc.evaluate.acceptance import evaluate_draft
from eagle_rpc.evaluate.own_text import own_texts
from eagle_rpc.jobs.assembly import make_draft, make_record
from eagle_rpc.jobs.export import export_run
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.serving import load_export
from eagle_rpc.supervision import TokenBatch, VocabMapping
from eagle_rpc.target.loading import load_model
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.train.decoding import answers_of
from eagle_rpc.train.distributed import TrainerGroup
from eagle_rpc.train.loop import Trainer

NEW_TOKENS, GUESSES = 16, 4
TARGET = tiny_target_config()


def target_answers():
    """The target's answers to random prompts, one of whose tokens ends them; the context holds them just so."""
    model, _ = load_model(TARGET, torch.device("cpu"), cache_dir="unused", seed=0)
    generator = torch.Generator().manual_seed(1)
    context = model.config.max_position_embeddings
    lengths = (3, 5, 8, 13, 21, context - NEW_TOKENS - GUESSES, 4, 6)
    prompts = [torch.randint(96, (length,), generator=generator).tolist() for length in lengths]
    limits = {"batch_size": 4, "max_new_tokens": NEW_TOKENS, "tokens_after_end": 0}
    stop = own_texts(model, prompts, stop_token_ids=(), **limits)[0].token_ids[6]
    return model, own_texts(model, prompts, stop_token_ids={stop}, **limits), stop


@pytest.mark.parametrize("packed_length", [None, 64])
def test_the_last_validation_counts_what_evaluation_counts(tmp_path, packed_length):
    model, texts, stop = target_answers()
    answers = [token for text in texts for token in text.token_ids]
    chats = ChatDataset(
        [
            Example(torch.tensor(text.ids), torch.arange(len(text.ids)) >= len(text.prompt_ids))
            for text in texts
        ],
        max_length=64,
    )
    config = Config(
        target=TARGET,
        train=train_config(max_steps=30, validate_every=0, validation_batches=99, autocast=None),
        draft=DraftConfig(vocab_size=24, ttt_steps=GUESSES),
    )
    shown = torch.tensor(answers).bincount(minlength=96)
    mapping = VocabMapping.from_token_ids(shown.topk(24).indices, 96)
    backend, shape = eagle_rpc.load_target(TARGET), load_target_shape(TARGET, cache_dir="unused")
    backend.open_session(mapping)
    plan = {"batch_size": 2, "packed_length": packed_length}
    record = make_record(config, shape, backend, mapping)
    draft = make_draft(config, shape, backend, torch.device("cpu"))
    trainer = Trainer(
        config.train,
        config.draft,
        draft=draft,
        backend=backend,
        batches=BatchPlan(chats, **plan),
        validation=BatchPlan(chats, endless=False, **plan),
        num_draft_tokens=GUESSES,
        group=TrainerGroup(),
        run=RunDirectory(tmp_path),
        record=record,
        stop=threading.Event(),
    )
    trainer.train()
    weights = dict(trainer.learner.weights())
    serving = ServingConfig(dir=str(tmp_path / "export"), dtype=eagle_rpc.DType.float32)
    export_run(weights, record, draft.embed_tokens.weight, serving, step=2, validation=None)
    settings = EvaluateConfig(max_new_tokens=NEW_TOKENS, num_draft_tokens=GUESSES)
    prompts = [list(text.prompt_ids) for text in texts]
    result = evaluate_draft(model, load_export(tmp_path / "export"), prompts, settings, stop_ids={stop})
    line = list(read_metrics(tmp_path / "metrics.jsonl"))[-1]
    for name in ("accept_length", "accept_length_within_text", "acceptance_per_position"):
        assert line[f"validation/{name}"] == pytest.approx(getattr(result, name), abs=1e-9), name
    assert result.counts_agree and result.accept_length > result.accept_length_within_text > 1.1
    assert min(len(text.token_ids) for text in texts) < NEW_TOKENS


def test_each_answer_of_a_batch_is_a_text_with_its_chat_before_it():
    mask = [[0, 0, 1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0, 1, 0]]
    tokens = TokenBatch(
        input_ids=torch.arange(16).view(2, 8),
        attention_mask=torch.tensor([[1] * 6 + [0] * 2, [1] * 7 + [0]]),
        loss_mask=torch.tensor(mask),
        segment_ids=torch.tensor([[0] * 6 + [1] * 2, [0] * 3 + [1] * 4 + [2]]),
    )
    assert answers_of(tokens) == [
        TargetText(prompt_ids=[0, 1], token_ids=[2, 3]),
        TargetText(prompt_ids=[0, 1, 2, 3, 4], token_ids=[5]),
        TargetText(prompt_ids=[8], token_ids=[9]),
        TargetText(prompt_ids=[11], token_ids=[12]),
        TargetText(prompt_ids=[11, 12, 13], token_ids=[14]),
    ]
