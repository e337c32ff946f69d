"""The embedded prompts: questions and statements of small talk from the PyPI package chitchat-dataset (MIT).

Only its data file is read. The package, which is old, is not imported, and its dependencies are not needed.
"""

import json
import logging
import random
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from eagle_rpc.errors import DataError
from eagle_rpc.process.files import replaced_file

logger = logging.getLogger(__name__)

NUM_TRAIN, NUM_HELDOUT = 8000, 200

_DISTRIBUTION = "chitchat-dataset"
_FILE = "chitchat_dataset/dataset.json"
_INSTALL = "pip install --no-deps chitchat-dataset==0.9.0"
_QUESTION = re.compile(
    r"(what|how|why|who|where|when|which|whose|is|are|was|were|am|do|does|did|have|has|can|could|would|should"
    r"|will|may)\b",
    re.IGNORECASE,
)
_SHORTEST, _LONGEST = 20, 200  # characters


def prepare_chitchat_prompts(
    output_dir: str | Path, *, num_train: int, num_heldout: int, seed: int = 0
) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `heldout.jsonl`, chats of one user turn each, and returns their paths.

    Nothing is done if both files exist. Equal arguments select equal prompts; held-out ones do not depend on
    `num_train`. Any two prompts, also across the files, differ in more than case, spaces and punctuation.
    Raises `DataError` if the package is not installed or holds too few prompts.
    """
    train_path, heldout_path = Path(output_dir) / "train.jsonl", Path(output_dir) / "heldout.jsonl"
    if train_path.exists() and heldout_path.exists():
        return train_path, heldout_path
    prompts = _select(_turns(_dataset_path()), num_heldout + num_train, seed)
    for path, texts in ((heldout_path, prompts[:num_heldout]), (train_path, prompts[num_heldout:])):
        _write(path, texts)
    logger.info("wrote %d prompts to %s and %d to %s", num_train, train_path, num_heldout, heldout_path)
    return train_path, heldout_path


def _dataset_path() -> Path:
    try:
        path = Path(str(metadata.distribution(_DISTRIBUTION).locate_file(_FILE)))
    except metadata.PackageNotFoundError as error:
        raise DataError(
            f"data.prompt_source=chitchat needs the package {_DISTRIBUTION}, got none: {_INSTALL}"
        ) from error
    if not path.is_file():
        raise DataError(f"the package {_DISTRIBUTION} must hold {_FILE}, got none: {_INSTALL}")
    return path


def _turns(path: Path) -> Iterator[str]:
    """All messages. A chat is a list of turns, a turn is a list of messages by one person."""
    for chat in json.loads(path.read_bytes()).values():
        for turn in chat["messages"]:
            for message in turn:
                yield " ".join(message["text"].split())


def _select(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """`count` different texts, first those that depend least on earlier turns; otherwise in random order."""
    distinct: dict[str, str] = {}
    for text in texts:
        if text.isascii() and text[:1].isalpha() and _SHORTEST <= len(text) <= _LONGEST:
            distinct.setdefault(re.sub(r"[^a-z0-9]+", " ", text.lower()).strip(), text)
    if len(distinct) < count:
        raise DataError(f"{_DISTRIBUTION} must hold the {count} prompts asked for, got {len(distinct)}")
    prompts = list(distinct.values())
    random.Random(seed).shuffle(prompts)
    prompts.sort(key=_dependence)
    return prompts[:count]


def _dependence(text: str) -> int:
    """Dependence on earlier turns: 0 for a question from its first word on, 1 for other questions, else 2."""
    if not text.endswith("?"):
        return 2
    return 0 if _QUESTION.match(text) else 1


def _write(path: Path, prompts: list[str]) -> None:
    with replaced_file(path) as fresh, fresh.open("w", encoding="ascii") as file:
        for prompt in prompts:
            file.write(json.dumps({"messages": [{"role": "user", "content": prompt}]}) + "\n")
