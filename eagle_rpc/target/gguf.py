"""GGUF files, each converted once to a directory of safetensors.

transformers dequantises a GGUF file at every load, in about ten seconds. The directory loads to the same bits
in a fraction of a second, with the right special tokens in every version.
"""

import contextlib
import hashlib
import importlib.util
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from eagle_rpc.errors import ConfigError
from eagle_rpc.process.files import replaced_directory
from eagle_rpc.process.waiting import wait_until
from eagle_rpc.report.progress import Progress

logger = logging.getLogger(__name__)

# Seconds that a process waits while another one converts the same file.
_CONVERSION_TIMEOUT = 1800.0


def locate_gguf(name: str) -> Path:
    """The file `package/file.gguf` of an installed package, which is not imported; an existing path as it is.

    Raises `ConfigError` if there is no such file.
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
    """The directory below `cache_dir` with fp32 safetensors, config and tokenizer; made by the first call.

    Processes that start together convert once. Raises `WaitTimeout` if another conversion does not finish.
    """
    target = cache_dir / f"{source.stem}-{_content_hash(source)}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{target}.lock")
    try:
        wait_until(
            lambda: target.is_dir() or _acquired(lock),
            f"another process that converts {source}",
            seconds=_CONVERSION_TIMEOUT,
            stop=threading.Event(),
        )
        if not target.is_dir():
            _convert(source, target)
    finally:
        lock.release()
    return target


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _content_hash(source: Path) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _own_progress() -> Iterator[None]:
    """transformers would draw a bar of tensors also where there is no terminal, whatever its settings."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def shown(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        progress = Progress("tensor", len(tensors), title="converting")
        with contextlib.closing(progress):
            for tensor in tensors:
                yield tensor
                progress.advance()

    theirs = getattr(reader, "tqdm", None)
    vars(reader)["tqdm"] = shown
    try:
        yield
    finally:
        vars(reader)["tqdm"] = theirs


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting %s to safetensors in %s, once", source.name, target)
    folder, file = source.parent, source.name
    # Without dequantize the model counts as quantised and refuses to be saved.
    plain = GgufConfig(dequantize=True)
    with _own_progress():
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32, quantization_config=plain
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    for name in ("bos", "eos", "pad", "unk"):
        # transformers 5.17 reads wrong special tokens into the tokenizer; the config has the right ones.
        token_id = getattr(model.config, f"{name}_token_id", None)
        token = None if token_id is None else tokenizer.convert_ids_to_tokens(token_id)
        setattr(tokenizer, f"{name}_token", token)
    with replaced_directory(target) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
