import json

import pytest
from report_cases import FILES, evaluation, sources_of, write_run
from support.browser import look_at, needs_browser

from eagle_rpc.errors import DataError
from eagle_rpc.report.run_page import write_report
from eagle_rpc.report.sources import Sources


@pytest.fixture
def run(tmp_path):
    """A run beside two earlier ones, one of which answered other prompts; it also compared two drafts."""
    runs = tmp_path / "runs"
    write_run(runs / "before")
    write_run(runs / "unlike", evaluation=evaluation(prompts=["another"]))
    compared = [runs / "before" / "export", runs / "unlike" / "export"]
    return write_run(runs / "now", compared=compared)


def test_the_page_has_figures_texts_configuration_and_advice(run):
    advice = write_report(sources_of(run), run / "report.html")
    text = (run / "report.html").read_text()
    assert any("trainers waited 31%" in line for line in advice)
    for words in (*advice, "a-run", "target0", "torch 2", "identical", "1.50 times"):
        assert str(words).replace("'", "&#39;") in text, words
    for role in (
        "trainers waiting",
        "Trainers waiting for targets",
        "target: idle",
        "trainer: waiting (queue)",
    ):
        assert role in text, role
    for caption in ("By position", "By category", "By length", "Loss", "Where the time went", "Coverage"):
        assert f"<figcaption>{caption}" in text
    assert '<span class="p1"> Italy</span>' in text and '<span class="p6"> there</span>' in text
    assert "In<span" in text  # the target's own token has no colour


def test_the_page_needs_no_network_and_is_small_enough_to_send(run):
    write_report(sources_of(run), run / "report.html")
    text = (run / "report.html").read_text()
    assert "<script src" not in text and '<link rel="stylesheet' not in text
    assert len(text) < 5.2e6


def test_words_of_a_model_cannot_become_html(run):
    write_report(sources_of(run), run / "report.html")
    text = (run / "report.html").read_text()
    assert "<b>Rome</b>" not in text and "&lt;b&gt;Rome" in text and " &lt;i&gt;" in text


def test_earlier_runs_are_those_that_answered_the_same_prompts(run):
    assert list(sources_of(run).earlier) == ["before"]


def test_compared_drafts_bring_the_metrics_of_their_runs(run):
    assert [path.rsplit("/", 2)[-2] for path in sources_of(run).compared] == ["before", "unlike"]


@pytest.mark.parametrize("absent", FILES)
def test_each_file_may_be_absent(run, absent):
    (run / absent).unlink()
    write_report(sources_of(run), run / "report.html")
    assert (run / "report.html").stat().st_size > 10**6


def test_a_directory_without_figures_is_empty(tmp_path):
    assert sources_of(tmp_path).is_empty and Sources(name="a").is_empty


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_is_named(run, content):
    (run / "evaluation.json").write_text(content)
    with pytest.raises(DataError, match=r"evaluation\.json must"):
        sources_of(run)


def test_an_evaluation_of_an_earlier_version_is_shown(run):
    old = json.loads((run / "evaluation.json").read_text())
    del old["acceptance_per_position_intervals"]
    for prompt in old["prompts"]:
        del prompt["pieces"]
    (run / "evaluation.json").write_text(json.dumps(old))
    write_report(sources_of(run), run / "report.html")


@needs_browser
@pytest.mark.slow
def test_a_browser_draws_all_charts_at_both_widths_without_errors(run):
    write_report(sources_of(run), run / "report.html")
    seen, messages = look_at(run / "report.html", [1440, 400])
    assert messages == []
    for width, content, charts, drawn, cut in seen:
        assert content <= width and cut == 0
        assert drawn == charts > 10
