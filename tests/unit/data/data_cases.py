"""Small chat files and datasets."""

import json
from pathlib import Path

import torch

from eagle_rpc.data import ChatDataset, Example


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages that user and assistant take turns in."""
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def write_lines(path: Path, *records: object) -> Path:
    """Records as JSON lines; strings and bytes as they are."""
    with path.open("wb") as file:
        for record in records:
            line = (
                record
                if isinstance(record, bytes)
                else (record if isinstance(record, str) else json.dumps(record)).encode()
            )
            file.write(line + b"\n")
    return path


def dataset_of_lengths(*lengths: int, max_length: int = 4096) -> ChatDataset:
    """Example i begins with token i + 1, which tells it from the others, and supervises its second half."""
    examples = []
    for number, length in enumerate(lengths):
        ids = torch.full((length,), 7, dtype=torch.int64)
        ids[0] = number + 1
        examples.append(Example(ids, torch.arange(length) >= length // 2))
    return ChatDataset(examples, max_length=max_length)
