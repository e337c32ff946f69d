"""The local directory of the files of a target. Importing it loads neither torch nor transformers."""

from pathlib import Path

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError, in_one_line
from eagle_rpc.process.files import is_lfs_pointer
from eagle_rpc.target.gguf import convert_gguf, locate_gguf

# Files of a hub model that loading needs: no pickled weights, no code.
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
# A pointer of git-lfs has some 130 bytes.
_POINTER_BYTES = 1024


def resolve_model_dir(config: TargetConfig, cache_dir: str | Path) -> Path:
    """The local directory of `config.model`, downloaded or converted if it is absent.

    Raises `ConfigError` for a random target, which has no directory, for a model that cannot be found, and for
    files that git-lfs has not fetched.
    """
    return local_directory(config, cache_dir, _HUB_FILES)


def local_directory(config: TargetConfig, cache_dir: str | Path, hub_files: list[str]) -> Path:
    """`resolve_model_dir` with these files alone of a hub model."""
    if config.random:
        raise ConfigError("target.random describes a model without a directory, tokenizer or stored weights")
    if config.model.endswith(".gguf"):
        return convert_gguf(locate_gguf(config.model), Path(cache_dir))
    directory = Path(config.model)
    if not directory.is_dir():
        return _download(config.model, hub_files)
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.stat().st_size < _POINTER_BYTES and is_lfs_pointer(file):
            raise ConfigError(
                f"target.model must hold its files, got {directory} with a git-lfs pointer as {file.name}: "
                "run git lfs pull there"
            )
    return directory


def _download(name: str, files: list[str]) -> Path:
    """These files of a hub model, from the local cache without a network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HFValidationError, RepositoryNotFoundError):
        reason = "no such directory, and no hub model of that name"
    except LocalEntryNotFoundError:
        reason = "no such directory, and no hub model of that name on this host; the hub cannot be reached"
    except HfHubHTTPError as error:
        reason = f"no such directory, and the hub refuses: {in_one_line(error)}"
    raise ConfigError(
        f"target.model must be a directory, a hub model or package/file.gguf, got {name}: {reason}"
    )
