"""The progress of a training run, read from its metrics file."""

import json
import os
import time
from pathlib import Path

_TAIL_BYTES = 4096


class Progress:
    """The last step in `metrics.jsonl`, and the pauses between steps. Call `look` often."""

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics
        self._seen: tuple[int, int, int] | None = None
        self.step = 0
        self.advanced = 0  # looks at which a later step was seen
        self.last_advance = time.monotonic()
        self.longest_pause = 0.0

    def restart_clock(self) -> None:
        """`longest_pause` counts from the last advance before now."""
        self.longest_pause = 0.0

    def look(self) -> None:
        step = self._last_step()
        now = time.monotonic()
        self.longest_pause = max(self.longest_pause, now - self.last_advance)
        # A resumed run goes back to its checkpoint.
        if step > self.step:
            self.advanced += 1
            self.last_advance = now
        self.step = step

    def _last_step(self) -> int:
        try:
            found = self._metrics.stat()
            identity = (found.st_ino, found.st_size, found.st_mtime_ns)
            if identity == self._seen:
                return self.step
            with self._metrics.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                whole = file.read().rpartition(b"\n")[0].splitlines()
        except FileNotFoundError:
            return 0
        self._seen = identity
        return json.loads(whole[-1])["step"] if whole else 0
