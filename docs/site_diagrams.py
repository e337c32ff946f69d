"""Ships Mermaid, which draws the diagrams, with the site; `mkdocs.yml` names this hook.

The theme takes a Mermaid that a page has loaded, and else the reader's browser fetches one from unpkg.com, so that
without a network diagrams stay text. `npm install --no-save --prefix .cache/site mermaid@11` before the build
ends that.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_MERMAID = Path(__file__).parents[1] / ".cache/site/node_modules/mermaid/dist/mermaid.min.js"
_ON_SITE = "assets/mermaid.min.js"


def on_config(config: Any) -> Any:
    if _MERMAID.is_file():
        config.extra_javascript.append(_ON_SITE)
    return config


def on_files(files: Files, config: Any) -> Files:
    if _MERMAID.is_file():
        files.append(File.generated(config, _ON_SITE, abs_src_path=str(_MERMAID)))
    return files
