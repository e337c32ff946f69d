"""Real speculative decoding of held-out prompts: accept length, speed, and that the text is the target's own."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from eagle_rpc.config import Config
from eagle_rpc.data import ChatTemplate, read_chats
from eagle_rpc.demo.prompts import ensure_prompts
from eagle_rpc.errors import ConfigError
from eagle_rpc.evaluate import Evaluation, evaluate_draft, stop_token_ids
from eagle_rpc.process.startup import start_worker
from eagle_rpc.report.plots import plot_acceptance, plot_loss
from eagle_rpc.serving import load_export
from eagle_rpc.target.loading import load_model
from eagle_rpc.topology import resolve_device
from eagle_rpc.train import RunDirectory


def run(config: Config) -> int:
    """Writes `evaluation.json` and the plots; 1 if a text differs from the target's own beyond near-ties."""
    start_worker(config, "evaluate")
    ensure_prompts(config)
    export = load_export(Path(config.evaluate.draft))
    target = replace(config.target, dtype=config.evaluate.dtype)
    model, tokenizer = load_model(
        target,
        torch.device(resolve_device(config.target.device)),
        cache_dir=config.run.cache_dir,
        seed=config.run.seed,
    )
    if tokenizer is None:
        raise ConfigError(
            "target.random has no tokenizer to read evaluate.prompts with: name a stored target.model"
        )
    result = evaluate_draft(
        model,
        export,
        _prompt_ids(config, ChatTemplate(tokenizer, config.data.chat_template)),
        max_new_tokens=config.evaluate.max_new_tokens,
        num_draft_tokens=config.evaluate.num_draft_tokens,
        near_tie=config.evaluate.near_tie,
        stop_ids=stop_token_ids(model),
        tokenizer=tokenizer,
    )
    files = _write(config, result)
    sys.stdout.write(_summary(result))
    for file in files:
        sys.stdout.write(f"wrote {file}\n")
    return 0 if result.identical_texts else 1


def _prompt_ids(config: Config, template: ChatTemplate) -> list[list[int]]:
    """Each chat up to its last user turn, as token ids after which the answer begins."""
    chats = read_chats(config.evaluate.prompts, on_error=config.data.on_error, needed_role="user").chats
    prompts = []
    for chat in chats[: config.evaluate.num_prompts]:
        last_question = max(index for index, message in enumerate(chat.messages) if message.role == "user")
        prompts.append(template.prompt_ids(chat.messages[: last_question + 1]))
    return prompts


def _write(config: Config, result: Evaluation) -> list[Path]:
    directory = RunDirectory.of(config)
    directory.evaluation.parent.mkdir(parents=True, exist_ok=True)
    result.write(directory.evaluation)
    files = [Path(config.evaluate.draft), directory.evaluation, directory.acceptance_plot]
    plot_acceptance(result.acceptance_per_position, result.accept_length, directory.acceptance_plot)
    if directory.metrics.exists():
        plot_loss(directory.metrics, directory.loss_plot)
        files.append(directory.loss_plot)
    return files


def _summary(result: Evaluation) -> str:
    positions = "  ".join(f"{share:.3f}" for share in result.acceptance_per_position)
    same = (
        "identical to the target's own"
        if result.identical_texts
        else f"DIFFERENT in {result.differing_texts} texts"
    )
    return (
        f"accept length        {result.accept_length:.3f} tokens a target call ({result.num_drafts} drafts, "
        f"{result.num_prompts} prompts)\n"
        f"accepted by position {positions}\n"
        f"text                 {same} ({result.near_ties} near-ties)\n"
        f"tokens per second    {result.tokens_per_second:.1f} with the draft, "
        f"{result.tokens_per_second_without_draft:.1f} without\n"
    )
