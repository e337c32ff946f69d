import math
from io import StringIO

import pytest
from rich.console import Console

from eagle_rpc.report.plots import plot_sweep
from eagle_rpc.report.sweep_table import SweptResult, over_seeds, print_table, write_csv, write_markdown


def result(rate: str, seed: str, accept_length: float | None, outcome: str = "finished") -> SweptResult:
    return SweptResult(
        values={"train.learning_rate": rate, "run.seed": seed},
        outcome=outcome,
        accept_length=accept_length,
        interval=None if accept_length is None else [accept_length - 0.1, accept_length + 0.2],
        supervised_tokens=100,
        train_seconds=7.0,
        validations=[(50, 1.2), (100, 1.1)],
    )


RESULTS = [
    *(result("0.001", str(seed), value) for seed, value in enumerate([1.5, 1.6, 1.7])),
    result("0.0003", "0", 2.0),
    result("0.0003", "1", None, "job=train: it | broke"),
]


def test_means_over_seeds_have_students_interval():
    first, second = over_seeds(RESULTS)
    assert (first.values, first.num_seeds) == ({"train.learning_rate": "0.001"}, 3)
    # 4.303 is the two-sided 95 % quantile for two degrees of freedom; the values' deviation is 0.1.
    half = 4.303 * 0.1 / math.sqrt(3)
    assert first.mean == pytest.approx(1.6) and first.interval == pytest.approx((1.6 - half, 1.6 + half))
    assert (second.num_seeds, second.mean, second.interval) == (1, 2.0, None)


def test_there_are_no_means_where_no_seed_was_swept():
    assert over_seeds([SweptResult(values={"a.b": "1"}, outcome="finished", accept_length=2.0)]) == []


def test_terminal_and_markdown_have_the_same_figures_and_csv_whole_numbers(tmp_path):
    write_markdown(RESULTS, tmp_path / "sweep.md")
    write_csv(RESULTS, tmp_path / "sweep.csv")
    shown = StringIO()
    print_table(RESULTS, Console(file=shown, width=200))
    text = (tmp_path / "sweep.md").read_text()
    for figure in ("1.500 [1.400, 1.700]", "1.200", "1.600 [1.352, 1.848]", "finished"):
        assert figure in text and figure in shown.getvalue()
    assert r"it \| broke" in text
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert lines[0].split(",")[:3] == ["train.learning_rate", "run.seed", "accept_length"]
    assert len({line.count(",") for line in lines}) == 1
    assert lines[5] == "0.0003,1,,,100,7.0,,,,,1.2,job=train: it | broke"


def test_a_sweep_gets_a_picture(tmp_path):
    plot_sweep(RESULTS, tmp_path / "some.png")
    plot_sweep(RESULTS[:1], tmp_path / "one.png")
    pictures = [(tmp_path / name).read_bytes() for name in ("some.png", "one.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and pictures[0] != pictures[1]
