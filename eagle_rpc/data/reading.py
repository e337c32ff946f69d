"""The chats of a source, read and checked."""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from eagle_rpc.config.choices import OnError
from eagle_rpc.data.chats import Chat
from eagle_rpc.data.problems import RecordProblems, describe
from eagle_rpc.data.records import parse_chat
from eagle_rpc.data.sources import read_records
from eagle_rpc.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChatFile:
    """The usable chats of a file, in the order of the file."""

    path: str
    chats: list[Chat]
    skipped: Counter[str]  # records left out, by kind of fault


def read_chats(path: str | Path, *, on_error: OnError, needed_role: str = "assistant") -> ChatFile:
    """Reads and checks all chats."""
    problems = RecordProblems(on_error)
    chats = []
    for place, record in read_records(str(path)):
        with problems.record(place):
            chats.append(parse_chat(record, place, needed_role))
    if not chats:
        raise DataError(f"{path} must hold at least one usable chat, got none; {describe(problems.skipped)}")
    if problems.skipped:
        logger.warning("%s: %d usable chats, %s", path, len(chats), describe(problems.skipped))
    return ChatFile(str(path), chats, problems.skipped)
