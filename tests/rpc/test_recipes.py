"""The recipes for large targets, end to end with tiny models: one of them always, the others as slow tests."""

from pathlib import Path

import pytest
from support.published_shapes import PUBLISHED
from support.recipe_runs import take_whole_path

pytestmark = [pytest.mark.rpc, pytest.mark.timeout(1800)]

ALWAYS = "qwen3_8b"
OTHERS = [pytest.param(recipe, marks=pytest.mark.slow) for recipe in PUBLISHED if recipe != ALWAYS]
FLOAT32 = [
    "target.dtype=float32",
    "regenerate.dtype=float32",
    "train.autocast=null",
    "target.compile_shapes=[]",
]


@pytest.mark.parametrize("recipe", [ALWAYS, *OTHERS])
def test_a_recipe_takes_the_whole_path_with_a_tiny_model_of_its_family(recipe: str, tmp_path: Path):
    exported, evaluation = take_whole_path(recipe, tmp_path, *FLOAT32, workers=2)
    assert exported["norm_output"] is True and exported["draft_vocab_size"] == 64
    assert evaluation["identical_texts"] is True and evaluation["counts_agree"] is True
