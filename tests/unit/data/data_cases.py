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


TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
# Records of one chat, "hello" and "hi" unless the form has no answer.
FORMS = {
    "messages": {"messages": turns("hello", "hi")},
    "ShareGPT": {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
    "roles in conversations": {"conversations": turns("hello", "hi")},
    "conversation": {"conversation_id": "1", "model": "m", "conversation": turns("hello", "hi")},
    "UltraChat's data": {"id": "0", "data": ["hello", "hi"]},
    "prompt and completion": {"prompt": "hello", "completion": "hi"},
    "prompt and completion in turns": {"prompt": turns("hello"), "completion": turns("hello", "hi")[1:]},
    "prompt beside its messages": {"prompt": "hello", "messages": turns("hello", "hi")},
    "Alpaca": {"instruction": "hello", "input": "", "output": "hi"},
    "question and answer": {"question": "hello", "answer": "hi"},
    "MATH": {"problem": "hello", "solution": "hi", "answer": "h", "level": 2},
    "query and response": {"query": "hello", "response": "hi"},
    "null beside full": {"messages": None, "conversations": turns("hello", "hi")},
    "empty beside full": {"messages": [], "conversations": turns("hello", "hi")},
    "null keys of turns": {
        "messages": [{**turn, "from": None, "value": None} for turn in turns("hello", "hi")]
    },
    "parts of text": {
        "messages": [
            {**turn, "content": [{"type": "text", "text": turn["content"], "image_url": None}]}
            for turn in turns("hello", "hi")
        ]
    },
    "turns as JSON text": {"messages": json.dumps(turns("hello", "hi"))},
}
