"""The worker's side of `Process.ask`: questions on stdin and answers on stdout, a line of JSON each."""

import json
import sys
from collections.abc import Iterator
from typing import Any


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def questions() -> Iterator[dict[str, Any]]:
    """Until stdin ends."""
    for line in sys.stdin:
        yield json.loads(line)
