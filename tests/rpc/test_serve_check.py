"""Drafts of a random target in vLLM on a CPU, in an environment that `--vllm-python` names or in this one."""

import importlib.util
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from support.guessing_drafts import (
    NEW_TOKENS,
    export_random_draft,
    likely_tokens,
    random_prompts,
    random_target,
)

from eagle_rpc.evaluate import ServedDraft, decode_here
from eagle_rpc.serving import load_export
from eagle_rpc.serving.engine_run import decode_in_engine, shifted_layers
from eagle_rpc.serving.engine_side import DecodingOutcome, DecodingWork
from eagle_rpc.serving.speculators_config import Speculators

pytestmark = pytest.mark.slow

GUESSES, SECONDS = 4, 1200.0


@pytest.fixture(scope="module")
def vllm_python(request: pytest.FixtureRequest) -> str:
    named = request.config.getoption("--vllm-python")
    if named is None and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM here, or --vllm-python=VLLM_ENV/bin/python")
    return str(named or sys.executable)


@pytest.mark.timeout(3600)
def test_vllm_drafts_and_accepts_as_we_do_in_both_forms_and_shifted_layers_show(
    tmp_path: Path, vllm_python: str
):
    model = random_target()
    target = tmp_path / "target"
    model.save_pretrained(target)
    mapping = likely_tokens(model)

    def decode(draft: Path) -> DecodingOutcome:
        asked = replace(work, draft=str(draft))
        log = tmp_path / "vllm.log"
        return decode_in_engine(vllm_python, asked, log=log, seconds=SECONDS, stop=threading.Event())

    plain, speculators = tmp_path / "plain", tmp_path / "speculators"
    export_random_draft(model, mapping, "all_norms", plain)
    export_random_draft(model, mapping, "all_norms", speculators, Speculators(str(target), GUESSES))
    work = DecodingWork("vllm", str(target), str(plain), "float32", random_prompts(), NEW_TOKENS, GUESSES, [])
    ours = decode_here(model, load_export(plain), work)
    assert ours == decode_here(model, load_export(speculators), work)
    assert sum(ours.counts[1]) > 100

    with shifted_layers(plain, model.config.num_hidden_layers) as shifted:
        control = decode(shifted)
    sides = {"engine": "vllm", "ours": ours, "near_tie": 1e-4}
    served = ServedDraft(**sides, theirs=decode(plain), control=control)
    assert served.is_ours, served.summary()
    assert not served.differing_texts and served.control_shows
    other_form = ServedDraft(**sides, theirs=decode(speculators), control=None)
    assert other_form.is_ours, other_form.summary()
