"""Training as someone watches it: a bar on a terminal, a log line every few seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

_BAR_SECONDS = 0.5
_LINE_SECONDS = 10.0


class TrainingProgress:
    """Advances by one optimiser step a call, and asks for figures only when they are about to be shown.

    `clock` gives seconds; figures are those of the training metrics.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self._total = total_steps
        self._step = first_step
        self._clock = clock
        self._last_shown = clock()
        self._bar: tqdm[Any] | None = None
        if stream.isatty():
            self._bar = tqdm(
                total=total_steps, initial=first_step, unit="step", file=stream, dynamic_ncols=True
            )

    def advance(self, figures: Callable[[], Mapping[str, Any]]) -> None:
        """One more step is done; `figures` may have to wait for the accelerator, so it is called seldom."""
        self._step += 1
        now = self._clock()
        due = (
            now - self._last_shown >= (_LINE_SECONDS if self._bar is None else _BAR_SECONDS)
            or self._step == self._total
        )
        text = summary(figures()) if due else None
        if due:
            self._last_shown = now
        if self._bar is not None:
            if text is not None:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif text is not None:
            logger.info("step %d/%d: %s", self._step, self._total, text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def summary(figures: Mapping[str, Any]) -> str:
    """Loss, first-step accuracy, simulated accept length, throughput and waiting in one short line."""
    return (
        f"loss {figures['loss']:.3f}, accuracy {figures['accuracy'][0]:.3f}, "
        f"accept length {figures['simulated_accept_length']:.2f}, {figures['tokens_per_second']:.0f} tok/s, "
        f"waiting {figures['wait_share']:.0%}"
    )
