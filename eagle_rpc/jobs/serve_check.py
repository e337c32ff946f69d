"""`job=serve_check`: whether serving engines draft and accept what this package does with an export."""

import json
import logging
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from eagle_rpc.config import Config
from eagle_rpc.errors import ConfigError
from eagle_rpc.evaluate import OwnOutcome, ServedDraft, decode_here
from eagle_rpc.jobs.decoding import load_decoding
from eagle_rpc.process import stop_signals
from eagle_rpc.process.files import replaced_file
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.process.startup import start_worker
from eagle_rpc.serving import load_export
from eagle_rpc.serving.engine_run import decode_in_engine, engine_python, shifted_layers
from eagle_rpc.serving.engine_side import SIDES, DecodingWork
from eagle_rpc.target.directory import resolve_model_dir
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.target.stop_tokens import stop_token_ids

logger = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Prints texts and counts of each engine, writes `serve_check.json`; 1 if an engine differs.

    Raises `ConfigError` if there is no engine, and as `load_export`, `load_decoding` and `decode_in_engine`.
    """
    start_worker(config, "serve_check")
    pythons = _pythons(config)
    work, ours = _decoded_here(config)
    checked = [_check(config, replace(work, engine=engine), pythons[engine], ours) for engine in pythons]
    report = RunDirectory.of(config).path / "serve_check.json"
    with replaced_file(report) as fresh:
        fresh.write_text(json.dumps([one.to_json() for one in checked], indent=2) + "\n")
    sys.stdout.write("".join(one.summary() for one in checked) + f"wrote {report}\n")
    return 0 if all(one.is_ours for one in checked) else 1


def _pythons(config: Config) -> dict[str, str]:
    """The Python of each engine that is named or installed here. Raises `ConfigError` if there is none."""
    found = {
        engine: python
        for engine in SIDES
        if (python := engine_python(engine, getattr(config.serve_check, f"{engine}_python"))) is not None
    }
    if not found:
        raise ConfigError(
            "serve_check.vllm_python or serve_check.sglang_python must name a Python with the engine, since "
            "neither vllm nor sglang is installed here, got nothing"
        )
    return found


def _decoded_here(config: Config) -> tuple[DecodingWork, OwnOutcome]:
    """The work of all engines, and ours. The model is given up again: an engine wants the whole GPU."""
    settings = config.evaluate
    directory = resolve_model_dir(config.target, config.run.cache_dir)
    export = load_export(Path(settings.draft))
    model, tokenizer, prompts = load_decoding(config)
    work = DecodingWork(
        engine="",
        target=str(directory.resolve()),
        draft=str(Path(settings.draft).resolve()),
        dtype=str(model.dtype).removeprefix("torch."),
        prompts=[one.token_ids for one in prompts],
        max_new_tokens=settings.max_new_tokens,
        num_draft_tokens=settings.num_draft_tokens,
        stop_token_ids=sorted(stop_token_ids(model.config, model.generation_config, tokenizer)),
    )
    ours = decode_here(model, export, work)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return work, ours


def _check(config: Config, work: DecodingWork, python: str, ours: OwnOutcome) -> ServedDraft:
    settings = config.serve_check
    log = RunDirectory.of(config).log_file(work.engine)
    shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
    shifted = shifted_layers(Path(work.draft), shape.num_layers) if settings.control else nullcontext()
    with stop_signals() as stop, shifted as copy:
        drafts = [work.draft, *([] if copy is None else [str(copy)])]
        outcomes = []
        for draft in drafts:
            logger.info(
                "%s decodes %d prompts with %s, log in %s", work.engine, len(work.prompts), draft, log
            )
            asked = replace(work, draft=draft)
            outcomes.append(decode_in_engine(python, asked, log=log, seconds=settings.timeout, stop=stop))
    theirs, *control = outcomes
    return ServedDraft(
        engine=work.engine,
        ours=ours,
        theirs=theirs,
        control=control[0] if control else None,
        near_tie=config.evaluate.near_tie,
    )
