"""Families of transformers from the weights to the answers, and the page that says what each of them does."""

from pathlib import Path

import pytest
from support.families import family_names
from support.family_jobs import try_all, try_family
from support.family_page import row, rows_of

PAGE = rows_of((Path(__file__).parents[3] / "docs" / "targets.md").read_text())

# One for each way in which families differ: experts, sinks, latent keys, windows, models inside models,
# recurrent states, convolutions, layers without keys, cut out of an encoder-decoder, refused.
REPRESENTATIVES = [
    "bart",
    "deepseek_v3",
    "gemma3",
    "gemma3n_text",
    "gemma4",
    "gpt_oss",
    "lfm2",
    "llama4",
    "mistral3",
    "phi3",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_moe",
]


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_a_family_does_what_the_page_says(family: str):
    assert row(try_family(family)) == PAGE[family]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_family_does_what_the_page_says(request: pytest.FixtureRequest):
    if not request.config.getoption("--all-families"):
        pytest.skip("takes a quarter of an hour: --all-families")
    outcomes = {outcome.family: row(outcome) for outcome in try_all(family_names())}
    assert outcomes == PAGE
