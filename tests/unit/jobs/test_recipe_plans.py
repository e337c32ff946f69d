"""The recipes of `conf/experiment/` for large targets: composed and planned at the published sizes."""

from pathlib import Path

import pytest
from support.published_shapes import PUBLISHED, write_published_shape

from eagle_rpc.config.checks import check
from eagle_rpc.config.choices import JobName
from eagle_rpc.config.compose import load
from eagle_rpc.config.launch import jobs, num_workers
from eagle_rpc.errors import ConfigError
from eagle_rpc.jobs import plan

# GPUs of a target, parameters of target and draft in millions, rotary embedding of the draft.
EXPECTED = {
    "qwen3_8b": (1, 8190.7, "plain"),
    "llama31_8b": (1, 8030.3, "llama3"),
    "gpt_oss_20b": (1, 20914.8, "yarn"),
    "qwen3_30b_a3b": (1, 30532.1, "plain"),
    "llama31_70b": (2, 70553.7, "llama3"),
}
# Tokens a second, as the page names them with their measurement.
MEASURED = {"qwen3_8b": 39445, "llama31_8b": 39445, "llama31_70b": 9185}


def test_every_recipe_has_a_published_shape():
    assert set(EXPECTED) == set(PUBLISHED)


@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_recipe_is_planned_without_weights(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    devices, parameters, rope = EXPECTED[recipe]
    model = write_published_shape(recipe, tmp_path / "model")
    # Without GPUs the devices of the plan are CPUs.
    config = load(
        f"experiment={recipe}", f"target.model={model}", "job=plan", "target.device=cpu", "train.device=cpu"
    )
    assert plan.run(config) == 0
    lines = {line[:32].strip(): line[32:] for line in capsys.readouterr().out.splitlines()}
    assert lines["run directory"] == f"runs/{recipe}"
    assert f"({parameters} M parameters)" in lines["target, weights"]
    assert "vocabulary 32000 of" in lines["draft"] and f"{rope} rotary embedding" in lines["draft, shape"]
    assert lines["draft, form"] == "1 layer, fc_norm, norm_output"
    assert lines["target, largest request"] == "2 x 4096 tokens"
    needed = [lines[f"target, device {number}"] for number in range(devices)]
    assert all(", fits 80 GiB: " in one for one in needed), needed
    assert lines["target, fewest devices"] == f"topology.devices_per_target={devices} fits 80 GiB a device"


@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_recipe_wants_its_target_named_and_nothing_else(recipe: str):
    with pytest.raises(ConfigError, match=r"^target\.model must be given, got nothing$"):
        load(f"experiment={recipe}")
    words = [f"experiment={recipe}", "target.model=somewhere"]
    config = load(*words)
    assert num_workers(config) == 2
    assert [job.name for job in jobs(config, words)] == ["regenerate", "train", "export", "evaluate"]
    for job in (JobName.regenerate, JobName.train, JobName.export):
        config.job.name = job
        check(config)


@pytest.mark.parametrize("recipe", EXPECTED)
def test_steps_of_a_recipe_take_in_as_many_tokens_as_its_page_counts(recipe: str):
    config = load(f"experiment={recipe}", "target.model=somewhere")
    train, tokens = (
        config.train,
        config.train.batch_size * config.data.longest_row * config.train.accumulation,
    )
    assert tokens == 131072
    page = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{recipe}` |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{train.max_steps:,}" and cells[2] == f"{train.max_steps * tokens / 1e9:.2f} G"
    assert float(cells[3]) == train.learning_rate
    if recipe in MEASURED:
        assert cells[5].split()[0] == f"{train.max_steps * tokens / MEASURED[recipe] / 3600:.1f}"
