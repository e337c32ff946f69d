"""The path of a batch, counted from the code, and the tables of it in docs/architecture.md."""

from typing import Any

import pytest
from support.documents import path_table
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
