"""The three paths of docs/architecture.md: those of a batch counted from the code, that of SIGTERM compared with it."""

from pathlib import Path
from typing import Any

import pytest
from support.documents import path_table
from support.ending_target import end_by_sigterm
from support.journey import Files, travel
from support.workers import run_workers

pytestmark = pytest.mark.rpc


@pytest.fixture(scope="module")
def paths() -> tuple[Files, Files]:
    """Files and functions to the model, and back to the loss."""
    result: Any = run_workers(travel, 1)[0]
    return result


def check_table(heading: str, counted: Files) -> None:
    listed = path_table(heading)
    assert sorted(listed) == sorted(counted)
    for file, functions in listed.items():
        assert {function.rpartition(".")[2] for function in functions} <= counted[file], file


def test_ids_reach_the_model_through_at_most_22_files_which_the_document_lists(paths: tuple[Files, Files]):
    assert len(paths[0]) <= 22
    check_table("Input ids", paths[0])


def test_supervision_reaches_the_loss_through_at_most_25_files_which_the_document_lists(
    paths: tuple[Files, Files],
):
    assert len(paths[1]) <= 25
    check_table("Supervision, from", paths[1])


def test_a_target_ends_by_the_functions_that_the_document_lists_in_its_order(tmp_path: Path):
    code, acts = run_workers(end_by_sigterm, 1, tmp_path)[0]
    assert code == 0
    table = path_table("SIGTERM")
    # The thread that reads signals sets an event and goes on to wait for the next one.
    del table["process/signals.py"]
    steps = []
    for file, functions in table.items():
        names = {function.rpartition(".")[2] for function in functions}
        assert names <= {name for acting, name in acts if acting == file}, file
        steps.append(min(acts.index((file, name)) for name in names))
    assert steps == sorted(steps), dict(zip(table, steps, strict=True))
