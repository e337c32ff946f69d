"""GGUF files become safetensors directories, once.

transformers dequantises a GGUF file in ten seconds at every load; the converted directory loads in a fraction of one, bit-equal,
and with the right special tokens in every version.
"""

import hashlib
import importlib.util
import logging
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from eagle_rpc.errors import ConfigError, WaitTimeout

logger = logging.getLogger(__name__)

# Seconds that a process waits while another one converts the same file.
_CONVERSION_TIMEOUT = 1800.0


def locate_gguf(name: str) -> Path:
    """The file that `package/file.gguf` names inside an installed package, or an existing path as it is.

    The package is not imported. Raises `ConfigError` if there is no such file.
    """
    if Path(name).is_file():
        return Path(name)
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / inside).is_file():
            return Path(folder) / inside
    raise ConfigError(
        f"target.model must name a file of an installed package (package/file.gguf) or a path, got {name}"
    )


def convert_gguf(source: Path, cache_dir: Path) -> Path:
    """The directory with fp32 safetensors, config and tokenizer of a GGUF file; made on the first call.

    Processes that start together convert once. A directory under its final name is complete, because it got that name last.
    Raises `WaitTimeout` if another process holds the conversion for too long.
    """
    target = cache_dir / f"{source.stem}-{_content_hash(source)}"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{target}.lock", timeout=_CONVERSION_TIMEOUT):
            if not target.is_dir():
                _convert(source, target)
    except Timeout as error:
        raise WaitTimeout(
            f"waited {_CONVERSION_TIMEOUT:.0f} s for another process to convert {source}"
        ) from error
    return target


def _content_hash(source: Path) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting %s to safetensors in %s, once", source.name, target)
    unfinished = target.with_name(f".{target.name}.unfinished")
    # Left by a process that died; the lock is ours, so nobody is at work there.
    shutil.rmtree(unfinished, ignore_errors=True)
    # Without dequantize the model counts as quantised and refuses to be saved.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    for name in ("bos", "eos", "pad", "unk"):
        # transformers 5.17 reads other special tokens into the tokenizer than into the config, which has them right.
        token_id = getattr(model.config, f"{name}_token_id", None)
        setattr(
            tokenizer,
            f"{name}_token",
            None if token_id is None else tokenizer.convert_ids_to_tokens(token_id),
        )
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(target)
