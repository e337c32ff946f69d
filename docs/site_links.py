"""Lets mkdocs build a site from pages that read as well in the repository; `mkdocs.yml` names this hook.

Pages beside `docs/` (README, results of benchmarks, a notebook) become pages of the site, and links between the two
are made to point there. A link to a file that is no page, such as a program, becomes its text.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\[([^\]\[]*)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
_PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "changes/README.md",
    "examples/README.md",
    "benchmarks/README.md",
]
_NOTEBOOKS = ["examples/one_batch.ipynb"]


def _outside() -> dict[str, str]:
    """Pages beside `docs/`: their path in the repository, and on the site."""
    results = sorted(_ROOT.glob("benchmarks/results/*.md"))
    paths = [*_PAGES, *(path.relative_to(_ROOT).as_posix() for path in results)]
    notebooks = {path: f"{path.removesuffix('.ipynb')}.md" for path in _NOTEBOOKS}
    return {path: "index.md" if path == "README.md" else path for path in paths} | notebooks


def on_files(files: Files, config: Any) -> Files:
    for path, site in _outside().items():
        if path in _NOTEBOOKS:
            files.append(File.generated(config, site, content=_as_markdown(_ROOT / path)))
        else:
            files.append(File.generated(config, site, abs_src_path=str(_ROOT / path)))
    return files


def _as_markdown(notebook: Path) -> str:
    """The cells of a notebook with their outputs; pictures stand in the page itself.

    Format: https://nbformat.readthedocs.io/en/latest/format_description.html
    """
    blocks = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        blocks.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                blocks.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output["data"]:
                blocks.append(f"![](data:image/png;base64,{''.join(output['data']['image/png']).strip()})")
    return "\n\n".join(blocks)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    outside = _outside()
    homes = {site: path for path, site in outside.items()}
    here = homes.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def follow(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[2]))
        site = outside.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if site is None or files.get_file_from_path(site) is None:
            # Left as it is where the file should be on the site, so that mkdocs warns of it.
            return match[0] if path.startswith("docs/") else match[1]
        target = posixpath.relpath(site, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{match[1]}]({target}{match[3] or ''})"

    return _LINK.sub(follow, markdown)
