"""The documents as a site."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import ROOT

MKDOCS = shutil.which("mkdocs", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.slow
@pytest.mark.skipif(MKDOCS is None, reason="mkdocs is not installed: pip install -e '.[docs]'")
def test_the_site_builds_without_warnings_and_with_the_pages_beside_docs(tmp_path: Path):
    command = [str(MKDOCS), "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    front = (tmp_path / "index.html").read_text()
    assert 'href="benchmarks/results/end_to_end_gpus_2026-11-26/"' in front and "pictures/report.png" in front
    assert 'id="eagle_rpc.library.serve"' in (tmp_path / "api" / "index.html").read_text()
    # No link of a page is left that only the repository could follow.
    pages = tmp_path.rglob("*.html")
    assert [page for page in pages if re.search(r'href="(?!https?:)[^"]*\.md["#]', page.read_text())] == []


def test_the_navigation_names_every_page():
    named = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages - named == set()
