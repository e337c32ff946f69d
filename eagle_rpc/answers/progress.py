"""Progress of regeneration: a bar on a terminal, a log line every few seconds elsewhere."""

import logging
import sys
import time

from tqdm import tqdm

from eagle_rpc.answers.engine import Answer, AnswerEngine

logger = logging.getLogger(__name__)

# Seconds between two lines.
_LINE_SECONDS = 10.0


class AnswerProgress:
    """Chats that are done, answer tokens a second and the seconds that are left."""

    def __init__(self, total: int, engine: AnswerEngine) -> None:
        self._total = total
        self._engine = engine
        self._chats = 0
        self._finished_tokens = 0
        self._started = self._shown = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="chat", dynamic_ncols=True, disable=not on_terminal)

    def add_answer(self, answer: Answer) -> None:
        self._finished_tokens += len(answer.token_ids) + (not answer.truncated)

    def add_chat(self) -> None:
        """One more chat is written or given up."""
        self._chats += 1
        now = time.monotonic()
        rate = self._engine.num_generated / max(now - self._started, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} answer tokens/s", refresh=False)
        self._bar.update()
        due = now - self._shown >= _LINE_SECONDS or self._chats == self._total
        if self._bar.disable and due:
            self._shown = now
            # Chats are finished in waves, so the tokens of unfinished answers count too.
            tokens_left = self._total * self._finished_tokens / self._chats - self._engine.num_generated
            left = max(0.0, tokens_left) / max(rate, 1e-9)
            counts = (self._chats, self._total)
            logger.info("%d/%d chats, %.0f answer tokens/s, %.0f s left", *counts, rate, left)

    def close(self) -> None:
        self._bar.close()
