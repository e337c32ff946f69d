"""The files of a target, and what is read of them beside weights: its configuration, shape and tokenizer."""

import importlib.util
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.process.files import is_lfs_pointer
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.gguf import convert_gguf, locate_gguf
from eagle_rpc.target.stored import continues_text, in_one_line

# Files of a hub model that loading needs: no pickled weights, no code.
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
# A pointer of git-lfs has some 130 bytes.
_POINTER_BYTES = 1024
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges")
_SENTENCEPIECE = importlib.util.find_spec("sentencepiece") is not None


def resolve_model_dir(config: TargetConfig, cache_dir: str | Path) -> Path:
    """The local directory of `config.model`, downloaded or converted if it is absent.

    Raises `ConfigError` for a random target, which has no directory, for a model that cannot be found, and for
    files that git-lfs has not fetched.
    """
    return _local_directory(config, cache_dir, _HUB_FILES)


def _local_directory(config: TargetConfig, cache_dir: str | Path, hub_files: list[str]) -> Path:
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


def load_target_config(config: TargetConfig, *, cache_dir: str | Path) -> PretrainedConfig:
    """The transformers configuration of the target, without its weights.

    Raises `ConfigError` if there is none, or one of a model that does not continue text.
    """
    if not config.random:
        directory = _local_directory(config, cache_dir, ["config.json"])
        try:
            hf_config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError) as error:
            rule = "target.model must be a model that transformers knows"
            raise ConfigError(f"{rule}, got {config.model}: {in_one_line(error)}") from error
        if not continues_text(hf_config):
            raise ConfigError(
                f"target.model must be a causal language model, alone or in a vision-language model, got "
                f"{config.model} of type {hf_config.model_type}, which transformers does not know as one"
            )
        return hf_config
    fields = dict(config.random)
    try:
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"target.random must name a model_type that transformers knows, got {config.random}"
        ) from error


def load_target_shape(config: TargetConfig, *, cache_dir: str | Path) -> TargetShape:
    """The target's shape. Raises `ConfigError` as `load_target_config` and `TargetShape.of`."""
    return TargetShape.of(load_target_config(config, cache_dir=cache_dir))


def load_tokenizer(config: TargetConfig, *, cache_dir: str | Path) -> PreTrainedTokenizerBase | None:
    """The target's tokenizer; null for a random target, which has none. Raises `ConfigError` if it is unusable."""
    if config.random:
        return None
    directory = resolve_model_dir(config, cache_dir)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        # transformers and tokenizers raise any class for a file that is broken or missing.
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        found = [file.name for file in directory.iterdir() if file.name.startswith(_TOKENIZER_FILES)]
        if not found:
            reason = "there is no file of one"
        elif "tokenizer.json" not in found and "tokenizer.model" in found and not _SENTENCEPIECE:
            reason = "its tokenizer.model needs a package: pip install sentencepiece"
        raise ConfigError(
            f"target.model must have a tokenizer that transformers loads, got {config.model}: {reason}"
        ) from error
