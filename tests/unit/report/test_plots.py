import json

import pytest

from eagle_rpc.errors import DataError
from eagle_rpc.report.plots import plot_acceptance, plot_loss

PNG = b"\x89PNG\r\n"


def metrics_file(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_gets_a_picture_with_and_without_validation(tmp_path):
    lines = [
        {"step": step, "loss": 3.0 / step, "simulated_accept_length": 1 + step / 10} for step in range(1, 5)
    ]
    validated = [*lines, {"step": 4, "validation/loss": 1.0, "validation/simulated_accept_length": 1.3}]
    decoded = [*validated, {"step": 4, "validation/accept_length": 1.2}]
    pictures = []
    for name, content in (("plain", lines), ("validated", validated), ("decoded", decoded)):
        output = tmp_path / "plots" / f"{name}.png"
        plot_loss(metrics_file(tmp_path / f"{name}.jsonl", content), output)
        pictures.append(output.read_bytes())
    assert pictures[0].startswith(PNG)
    assert len(set(pictures)) == 3


@pytest.mark.parametrize("lines", [[], [{"step": 1, "validation/loss": 1.0}]])
def test_metrics_without_training_are_refused(tmp_path, lines):
    with pytest.raises(DataError, match=r"metrics\.jsonl must hold the loss of at least one step"):
        plot_loss(metrics_file(tmp_path / "metrics.jsonl", lines), tmp_path / "loss.png")


def test_metrics_that_are_absent_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl must be the metrics"):
        plot_loss(tmp_path / "absent.jsonl", tmp_path / "loss.png")


def test_acceptance_gets_a_picture(tmp_path):
    plot_acceptance([0.5, 0.2, 0.05], 1.75, tmp_path / "acceptance.png")
    assert (tmp_path / "acceptance.png").read_bytes().startswith(PNG)
