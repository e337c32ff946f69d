"""Progress of one piece of work: a bar on a terminal, elsewhere a log line every ten seconds.

Both tell the time to go, at the mean pace so far.
"""

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from eagle_rpc.process.waiting import Clock

logger = logging.getLogger(__name__)

# tqdm's own without its rate: the text of most works has one.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_BAR_SECONDS = 0.5
_LINE_SECONDS = 10.0


class Progress:
    """Shows "title: unit 40/100, 2 min to go: text". The caller reports units of work that are done, and closes it.

    Args:
        unit: name of one unit of work in the singular.
        total: number of units, those done earlier included; None: unknown.
        done: units that were done earlier.
        title: name of the work.
        shown: False shows nothing, for all workers but one.
        stream: decides between bar and lines, and gets the bar; None: standard error.
    """

    def __init__(
        self,
        unit: str,
        total: int | None,
        *,
        done: int = 0,
        title: str = "",
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self._unit, self._total, self._done = unit, total, done
        self._title, self._shown, self._clock = title, shown, clock
        self._last_shown = self._started = clock()
        self._done_before = done
        self._under_way = 0.0
        self._bar: tqdm[Any] | None = None
        if shown and stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=done,
                unit=f" {unit}",
                desc=title or None,
                file=stream,
                dynamic_ncols=True,
                bar_format=None if total is None else _BAR,
            )

    def advance(
        self, describe: Callable[[], str] | None = None, *, count: int = 1, under_way: float = 0.0
    ) -> None:
        """`count` more units are done. `describe` gives the text; it is called only if the text is shown now.

        The last unit is shown at once if it has a text. `under_way`: what is done of other units, together, which
        counts for the time to go alone.
        """
        self._done += count
        self._under_way = under_way
        if not self._shown:
            return
        now = self._clock()
        interval = _LINE_SECONDS if self._bar is None else _BAR_SECONDS
        last = describe is not None and self._done == self._total
        text = None
        if last or now - self._last_shown >= interval:
            self._last_shown = now
            text = "" if describe is None else describe()
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
        elif text is not None:
            of_total = "" if self._total is None else f"/{self._total}"
            parts = (self._title, f"{self._unit} {self._done}{of_total}{self._to_go(now)}", text)
            logger.info("%s", ": ".join(filter(None, parts)))

    def _to_go(self, now: float) -> str:
        if self._total is None or self._done >= self._total or self._done == self._done_before:
            return ""
        done = self._done + self._under_way
        pace = (now - self._started) / (done - self._done_before)
        return f", {in_words(pace * max(0.0, self._total - done))} to go"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def in_words(seconds: float) -> str:
    """A duration for people: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
