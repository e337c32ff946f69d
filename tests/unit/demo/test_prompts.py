from pathlib import Path
from typing import Any

import pytest

from eagle_rpc.config import Config
from eagle_rpc.config.choices import PromptSource
from eagle_rpc.config.schema import DataConfig, EvaluateConfig, RegenerateConfig, RunConfig
from eagle_rpc.demo import prompts


@pytest.mark.parametrize("own", [True, False])
def test_the_embedded_prompts_are_written_only_where_files_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
):
    written: list[Any] = []
    monkeypatch.setattr(prompts, "prepare_chitchat_prompts", lambda *args, **settings: written.append(args))
    files = [tmp_path / "ask.jsonl", tmp_path / "heldout.jsonl"]
    for file in files[: 2 if own else 1]:
        file.write_text("")
    config = Config(
        run=RunConfig(cache_dir=str(tmp_path)),
        data=DataConfig(prompt_source=PromptSource.chitchat),
        regenerate=RegenerateConfig(prompts=str(files[0])),
        evaluate=EvaluateConfig(prompts=str(files[1])),
    )
    prompts.ensure_prompts(config)
    assert bool(written) is not own
