"""The documents as a site."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.browser import needs_browser, rendered
from support.documents import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MKDOCS = shutil.which("mkdocs", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
MERMAID = ROOT / ".cache/site/node_modules/mermaid"


def on_site(page: Path) -> str:
    """Its directory there."""
    return "" if page.name == "README.md" else page.relative_to(ROOT / "docs").with_suffix("").as_posix()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if MKDOCS is None:
        pytest.skip("mkdocs is not installed: pip install -e '.[docs]'")
    built = tmp_path_factory.mktemp("site")
    command = [MKDOCS, "build", "--strict", "--site-dir", str(built)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return built


@pytest.mark.slow
def test_the_site_has_the_pages_beside_docs_and_no_link_that_only_the_repository_could_follow(site: Path):
    front = (site / "index.html").read_text()
    assert 'href="benchmarks/results/end_to_end_gpus_2026-11-26/"' in front and "pictures/report.png" in front
    assert 'id="eagle_rpc.library.serve"' in (site / "api" / "index.html").read_text()
    pages = site.rglob("*.html")
    assert [page for page in pages if re.search(r'href="(?!https?:)[^"]*\.md["#]', page.read_text())] == []


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Of the site at a server on loopback: a browser lets no script of a file read other files."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@needs_browser
@pytest.mark.slow
@pytest.mark.skipif(
    not MERMAID.is_dir(), reason="needs npm install --no-save --prefix .cache/site mermaid@11"
)
@pytest.mark.parametrize("page", [page for page in PAGES if "```mermaid" in page.read_text()], ids=on_site)
def test_a_browser_draws_the_diagrams_of_a_page_without_a_network(address: str, page: Path):
    """The theme replaces the text of a diagram, an element `pre`, by its drawing."""
    dom, messages = rendered(f"{address}/{on_site(page)}")
    drawn, left = dom.count('<div class="mermaid">'), dom.count('<pre class="mermaid">')
    assert (drawn, left, messages) == (page.read_text().count("```mermaid"), 0, [])


def test_the_navigation_names_every_page():
    named = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages - named == set()
