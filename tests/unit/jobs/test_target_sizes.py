"""Where the sizes of a target come from, and what a plan loads for them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.families import tiny_config

from eagle_rpc.config.compose import load
from eagle_rpc.errors import ConfigError
from eagle_rpc.jobs import target_sizes as sizes_of

LOADS = """
import sys
from eagle_rpc.__main__ import main
try:
    main()
except SystemExit as end:
    print("loaded", *sorted({"torch", "transformers"} & set(sys.modules)), "code", end.code)
"""


@pytest.fixture
def words(tmp_path: Path):
    """Command lines of plans of one target of a family that is known by no formula."""
    tiny_config("gemma2").save_pretrained(tmp_path / "model")

    def words(*more: str) -> list[str]:
        settings = ["target=hf", f"target.model={tmp_path / 'model'}", f"run.cache_dir={tmp_path / 'cache'}"]
        form = ["draft.vocab_size=16", "target.aux_layer_ids=[0,1]", "data.max_length=32"]
        return ["job=plan", *settings, *form, "target.device=cpu", "train.device=cpu", *more]

    return words


def run(*words: str) -> str:
    """The output of a plan in a process of its own; its last line tells what it has loaded."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *words], capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout + done.stderr


def test_a_plan_of_a_kept_target_loads_neither_torch_nor_transformers(words):
    first, second = run(*words()), run(*words("train.batch_size=2"))
    assert "loaded torch transformers code 0" in first and "gemma2" in first
    assert "loaded code 0" in second and "target, largest request         2 x 32 tokens" in second


def test_the_plan_of_a_plain_family_and_a_refused_configuration_load_neither(tmp_path: Path):
    named = {"num_hidden_layers": 8, "tie_word_embeddings": False, "rope_theta": 1e4, "rms_norm_eps": 1e-6}
    tiny_config("llama", **named).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, **stored, **named})
    )
    form = ["draft.vocab_size=16", "data.max_length=32", "target.device=cpu", "train.device=cpu"]
    assert "loaded code 0" in run("job=plan", "target=hf", f"target.model={tmp_path}", *form)
    refused = run("job=train", "experiment=smollm2", "train.batch_size=0")
    assert "loaded code 1" in refused and "train.batch_size must be positive, got 0" in refused


def test_kept_sizes_are_those_that_were_measured_and_a_damaged_file_is_made_anew(words, tmp_path: Path):
    config = load(*words())
    measured = sizes_of.target_sizes(config)
    (file,) = (tmp_path / "cache").iterdir()
    assert sizes_of.target_sizes(config) == measured
    assert not measured.sdpa and measured.outline.name == "Gemma2ForCausalLM"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "sdpa": True}))
    assert sizes_of.target_sizes(config) == replace(measured, sdpa=True)
    file.write_text(json.dumps(content)[:-20])
    assert sizes_of.target_sizes(config) == measured and json.loads(file.read_text()) == content


def test_another_configuration_of_the_model_is_measured_anew(words, tmp_path: Path):
    before = sizes_of.target_sizes(load(*words()))
    tiny_config("gemma2", intermediate_size=80).save_pretrained(tmp_path / "model")
    assert sizes_of.target_sizes(load(*words())).outline.num_parameters > before.outline.num_parameters


def test_a_rotary_embedding_that_no_draft_can_have_is_refused_by_the_plan_and_nothing_is_kept(tmp_path: Path):
    fields = {**tiny_config("llama").to_dict(), "rope_parameters": {"rope_type": "linear", "factor": -1.0}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    settings = ["target=hf", f"target.model={tmp_path}", f"run.cache_dir={tmp_path / 'cache'}", "job=plan"]
    with pytest.raises(ConfigError, match=r"what rope_type linear needs .*; use draft\.rope=plain"):
        sizes_of.target_sizes(load(*settings, "draft.vocab_size=16"))
    assert not (tmp_path / "cache").exists()
    sizes_of.target_sizes(load(*settings, "draft.vocab_size=16", "draft.rope=plain"))
