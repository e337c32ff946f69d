"""Fragments of release notes, and the version."""

import re
import shutil
import subprocess

import pytest
from support.documents import ROOT

import eagle_rpc

FRAGMENTS = [
    one for one in sorted((ROOT / "changes").iterdir()) if one.name not in ("README.md", "template.jinja")
]
TOWNCRIER = shutil.which("towncrier")


def test_every_fragment_is_named_for_a_kind_and_says_something():
    kinds = re.findall(
        r'^directory = "(added|changed|fixed|removed)"$', (ROOT / "towncrier.toml").read_text(), re.M
    )
    assert len(kinds) == 4
    named = re.compile(rf"\+[a-z0-9_]+\.({'|'.join(kinds)})\.md")
    assert [
        one.name for one in FRAGMENTS if not named.fullmatch(one.name) or not one.read_text().strip()
    ] == []


def test_the_changelog_has_the_place_that_fragments_go_to():
    config, changelog = (ROOT / "towncrier.toml").read_text(), (ROOT / "CHANGELOG.md").read_text()
    marker = re.search(r'^start_string = "(.*)\\n"$', config, re.M)
    assert marker and f"## Unreleased\n\n{marker[1]}\n" in changelog


def test_the_version_is_semantic():
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?", eagle_rpc.__version__)


@pytest.mark.skipif(TOWNCRIER is None, reason="towncrier is not installed")
def test_towncrier_finds_every_fragment():
    done = subprocess.run(
        [str(TOWNCRIER), "build", "--draft", "--version", "9.9.9"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [one.name for one in FRAGMENTS if f"\n- {one.read_text().strip()}\n" not in done.stdout] == []
