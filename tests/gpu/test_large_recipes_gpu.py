"""The recipes for large targets on a GPU, in bfloat16 and with compiled layers as they are there."""

from pathlib import Path

import pytest
from gpu_marks import ON_A_GPU
from support.recipe_runs import take_whole_path

pytestmark = [*ON_A_GPU, pytest.mark.timeout(1800)]

# The fused step has kernels for heads from 64 on.
SIZES = {"hidden_size": 256, "head_dim": 64}


@pytest.mark.parametrize(
    ("recipe", "shapes"),
    [
        ("qwen3_8b", "[2x96]"),
        ("llama31_70b", "[2x96]"),
        pytest.param("gpt_oss_20b", "[]", marks=pytest.mark.slow),
        pytest.param("qwen3_30b_a3b", "[]", marks=pytest.mark.slow),
    ],
)
def test_a_recipe_takes_the_whole_path_on_a_gpu(recipe: str, shapes: str, tmp_path: Path):
    own = [f"target.compile_shapes={shapes}", "topology=single"]
    exported, evaluation = take_whole_path(recipe, tmp_path, *own, workers=1, sizes=SIZES)
    assert exported["norm_output"] is True
    assert evaluation["identical_texts"] is True and evaluation["counts_agree"] is True
