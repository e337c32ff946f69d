"""The store of the trainers that torchrun has gathered for an elastic job.

With `--nnodes=1:2` torchrun stops all trainers when an agent joins, and starts them anew with those of the new agent.
torch's store lives on with the keys of the trainers before, and agents may count restarts differently. So trainers
agree on a fresh namespace: each says a random word of its own, and the first one answers each word with the name of
the namespace. Words and answers of earlier trainers are answers to nobody.
"""

import secrets
import threading
from collections.abc import Callable

import torch.distributed as dist

from eagle_rpc.errors import WaitTimeout
from eagle_rpc.process import World
from eagle_rpc.process.waiting import wait_until
from eagle_rpc.rpc.static import torchrun_store

_LOOK_SECONDS = 0.1


def gathered_store(world: World, *, timeout: float, stop: threading.Event) -> dist.Store:
    """A store that only the trainers of this start have; all of them have arrived when the first one returns.

    Raises `WaitTimeout` if they do not within `timeout` seconds, or once `stop` is set.
    """
    if world.size == 1:
        return dist.HashStore()
    store = torchrun_store(world, timeout=timeout)
    meeting = dist.PrefixStore(f"eagle_rpc/{world.run_id}/meeting", store)
    meet = _gather if world.rank == 0 else _arrive
    start = meet(meeting, world, timeout, stop)
    return dist.PrefixStore(f"eagle_rpc/{world.run_id}/start {start}", store)


def _gather(meeting: dist.Store, world: World, timeout: float, stop: threading.Event) -> str:
    """Answers every other trainer until it has heard the answer."""
    start, missing = secrets.token_hex(8), set(range(1, world.size))

    def all_have_heard() -> bool:
        for rank in sorted(missing):
            if meeting.check([_heard(start, rank)]):
                missing.discard(rank)
            elif meeting.check([_word(rank)]):
                meeting.set(_answer(meeting.get(_word(rank)).decode()), start)
        return not missing

    def who() -> str:
        return f"missing: {', '.join(f'trainer{rank}' for rank in sorted(missing))}"

    _wait(all_have_heard, "the other trainers to start", timeout, stop, who)
    return start


def _arrive(meeting: dist.Store, world: World, timeout: float, stop: threading.Event) -> str:
    word = secrets.token_hex(8)
    meeting.set(_word(world.rank), word)
    _wait(lambda: meeting.check([_answer(word)]), "trainer0 to start", timeout, stop, str)
    start = meeting.get(_answer(word)).decode()
    meeting.set(_heard(start, world.rank), "")
    return start


def _wait(
    holds: Callable[[], bool], what: str, timeout: float, stop: threading.Event, why: Callable[[], str]
) -> None:
    if not wait_until(holds, what, seconds=timeout, stop=stop, pause=_LOOK_SECONDS, why=why):
        raise WaitTimeout(f"stopped while waiting for {what}")


def _word(rank: int) -> str:
    return f"word of {rank}"


def _answer(word: str) -> str:
    return f"answer to {word}"


def _heard(start: str, rank: int) -> str:
    return f"{start} heard by {rank}"
