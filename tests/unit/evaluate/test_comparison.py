import io
import json
from dataclasses import replace

import pytest
from evaluation_cases import PROMPTS, tiny_export, tiny_model
from rich.console import Console

from eagle_rpc.config.schema import EvaluateConfig
from eagle_rpc.evaluate import compare_drafts, evaluate_draft
from eagle_rpc.jobs.compare import print_comparison

SETTINGS = EvaluateConfig(max_new_tokens=10, num_draft_tokens=2)
CATEGORIES = ["writing", "math", "math"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def drafts(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("drafts")
    return {f"draft{seed}": tiny_export(model, directory / str(seed), seed) for seed in range(3)}


@pytest.fixture(scope="module")
def comparison(model, drafts):
    return compare_drafts(model, drafts, PROMPTS, SETTINGS, categories=CATEGORIES, stop_token_ids=())


def test_each_draft_has_the_figures_of_its_own_evaluation(model, drafts, comparison):
    for compared in comparison.drafts:
        export = drafts[compared.directory]
        alone = evaluate_draft(model, export, PROMPTS, SETTINGS, categories=CATEGORIES, stop_ids=())
        assert compared.overall.accept_length == pytest.approx(alone.accept_length)
        assert compared.overall.accept_length_interval == pytest.approx(alone.accept_length_interval)
        assert compared.accept_length_by_draft_tokens == pytest.approx(alone.accept_length_by_draft_tokens)
        assert compared.acceptance_per_position == pytest.approx(alone.acceptance_per_position)
        assert compared.by_category == alone.by_category
        assert compared.by_context == alone.by_context


def test_gains_are_over_the_first_draft(comparison):
    first, *others = comparison.drafts
    assert first.gain == 0 and first.gain_interval == (0, 0)
    for other in others:
        assert other.gain == pytest.approx(other.overall.accept_length - first.overall.accept_length)
        low, high = other.gain_interval
        assert low <= other.gain <= high
    assert any(other.gain != 0 for other in others)


def test_the_table_and_the_file_have_a_column_for_each_draft(comparison, tmp_path):
    text = io.StringIO()
    print_comparison(comparison, Console(file=text, width=160))
    printed = text.getvalue()
    for title in ("accept length", "gain over the first", "with 1 draft tokens", "accepted at position 2"):
        assert title in printed
    assert "category math" in printed and "context up to" not in printed  # all contexts are short
    assert all(name in printed for name in ("draft0", "draft1", "draft2"))
    comparison.write(tmp_path / "comparison.json")
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert [one["directory"] for one in written["drafts"]] == ["draft0", "draft1", "draft2"]
    assert written["num_prompts"] == 3 and written["num_tokens"] == 30


def test_trees_are_compared_as_well(model, drafts):
    settings = replace(SETTINGS, tree_nodes=8, tree_depth=3, tree_branching=2)
    compared = compare_drafts(model, drafts, PROMPTS, settings, categories=CATEGORIES, stop_token_ids=())
    for one in compared.drafts:
        alone = evaluate_draft(
            model, drafts[one.directory], PROMPTS, settings, categories=CATEGORIES, stop_ids=()
        )
        assert one.tree == alone.tree
    titles = [title for title, _ in compared.rows()]
    assert titles[-2:] == ["tree of 8 guesses, depth 3, branching 2", "tree over chains of 3"]
