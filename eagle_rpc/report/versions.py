"""The versions that figures depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version

from eagle_rpc import __version__

_PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """By name: this package, Python, the system and the libraries that compute."""
    found = {"eagle_rpc": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
