"""Fixtures of tests with an elastic service."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.elastic import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(tmp_path)
    yield made
    made.end()
