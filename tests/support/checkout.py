"""A copy of `launch.sh` that believes itself to be set up."""

import hashlib
import shutil
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]


def make_checkout(directory: Path, python: str) -> Path:
    """`launch.sh` in `directory`, with a virtual environment whose Python is a shell script with the lines `python`."""
    (directory / ".venv" / "bin").mkdir(parents=True)
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(_REPOSITORY / name, directory)
    versions = b"".join((directory / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    (directory / ".venv" / "installed").write_text(f"{hashlib.sha256(versions).hexdigest()}  -\n")
    script = directory / ".venv" / "bin" / "python"
    script.write_text(f"#!/bin/sh\n{python}\n")
    script.chmod(0o755)
    return directory
