"""What is read of the files of a target beside weights: its configuration, shape and tokenizer."""

import importlib.util
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import ConfigError, in_one_line
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.directory import local_directory, resolve_model_dir
from eagle_rpc.target.stored import continues_text

_TOKENIZER_FILES = ("tokenizer", "vocab", "merges")
_SENTENCEPIECE = importlib.util.find_spec("sentencepiece") is not None


def load_target_config(config: TargetConfig, *, cache_dir: str | Path) -> PretrainedConfig:
    """The transformers configuration of the target, without its weights.

    Raises `ConfigError` if there is none, or one of a model that does not continue text.
    """
    if not config.random:
        directory = local_directory(config, cache_dir, ["config.json"])
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
