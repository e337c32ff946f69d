"""OpenAI-compatible servers as an `Answerer`: several at a time, each with a bounded number of requests.

All servers draw from one queue, so a fast server gets more prompts. A server that cannot answer now rests, its
prompts go to the others, and it is tried again until `rpc.reconnect_deadline`.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, TypeAlias

from eagle_rpc.answers.answerer import Answer
from eagle_rpc.answers.regeneration import limits
from eagle_rpc.config import Config
from eagle_rpc.data import ChatTemplate
from eagle_rpc.errors import ConfigError, TargetUnavailable
from eagle_rpc.process.waiting import BoundedWait

if TYPE_CHECKING:
    # Needs the package openai, which only this backend needs.
    from eagle_rpc.answers.endpoint import Endpoint

logger = logging.getLogger(__name__)

_REST_SECONDS = 2.0
_Prompt: TypeAlias = tuple[str, list[int]]


@dataclass(slots=True)
class _Desk:
    """An endpoint and its requests."""

    endpoint: "Endpoint"
    busy: int = 0  # requests under way
    outage: BoundedWait | None = None  # since the endpoint's last answer, if it cannot answer now
    resumes: float = 0.0  # the time of the next try, in an outage

    def free(self, concurrency: int) -> int:
        """Requests that may start now. In an outage a single one tries whether it is over."""
        if self.outage is None:
            return concurrency - self.busy
        return int(self.busy == 0 and time.monotonic() >= self.resumes)


class EndpointAnswerer:
    """Answers from all endpoints. Made by `endpoint_answerer`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, endpoints: "Sequence[Endpoint]", config: Config
    ) -> None:
        self.num_generated = 0
        self._loop = loop
        self._desks = [_Desk(endpoint) for endpoint in endpoints]
        self._concurrency = config.regenerate.concurrency
        self._outage_seconds = config.rpc.reconnect_deadline
        self._waiting: deque[_Prompt] = deque()
        self._under_way: dict[asyncio.Task[Answer], tuple[_Desk, _Prompt]] = {}
        self._endpoints = tuple(endpoints)
        self._longest_answer = limits(config, self.context)[1]

    @property
    def ids_from_text(self) -> bool:
        """Whether ids of some answers are tokenised text, because a server does not say them."""
        return not all(one.returns_ids for one in self._endpoints)

    @property
    def fingerprint(self) -> str:
        """The served models by name: weights cannot be seen from here."""
        names = ", ".join(sorted({PurePath(one.model).name for one in self._endpoints}))
        return f"served as {names}" + (", text tokenised" if self.ids_from_text else "")

    @property
    def context(self) -> int | None:
        return min((one.context for one in self._endpoints if one.context is not None), default=None)

    def submit(self, key: str, prompt: Sequence[int]) -> None:
        """Queues a prompt, also while `answers()` runs."""
        self._waiting.append((key, list(prompt)))

    def answers(self) -> Iterator[Answer]:
        """Yields answers and refusals in the order in which they come, until no prompt is left.

        Raises `TargetUnavailable` once no endpoint has answered for `rpc.reconnect_deadline`, and
        `ConfigError` for an endpoint that refuses every request.
        """
        while self._waiting or self._under_way:
            self._send()
            for task in self._loop.run_until_complete(self._some_done()):
                desk, prompt = self._under_way.pop(task)
                desk.busy -= 1
                try:
                    answer = task.result()
                except TargetUnavailable as error:
                    self._waiting.appendleft(prompt)
                    self._rest(desk, error)
                    continue
                desk.outage = None
                self.num_generated += len(answer.said_ids)
                yield answer

    async def close(self) -> None:
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def _send(self) -> None:
        """Starts as many requests as may be under way, at the least busy endpoints first."""
        while self._waiting:
            desk = min(self._desks, key=lambda one: (one.free(self._concurrency) < 1, one.busy))
            if desk.free(self._concurrency) < 1:
                return
            prompt = self._waiting.popleft()
            task = self._loop.create_task(desk.endpoint.answer(*prompt, self._longest_answer))
            self._under_way[task] = desk, prompt
            desk.busy += 1

    async def _some_done(self) -> set[asyncio.Task[Answer]]:
        """Waits for an answer, or until a resting endpoint may be tried again."""
        resumes = [one.resumes for one in self._desks if one.outage is not None and one.busy == 0]
        seconds = max(0.0, min(resumes) - time.monotonic()) if resumes and self._waiting else None
        if not self._under_way:
            await asyncio.sleep(seconds or 0.0)
            return set()
        done, _ = await asyncio.wait(self._under_way, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return done

    def _rest(self, desk: _Desk, why: TargetUnavailable) -> None:
        """Lets an endpoint rest, or gives it up for good at the end of its time."""
        if desk.outage is None:
            desk.outage = BoundedWait(f"{desk.endpoint.url} to answer", self._outage_seconds)
        desk.outage.say(why)
        desk.resumes = time.monotonic() + _REST_SECONDS
        if desk.outage.over and desk in self._desks:
            self._desks.remove(desk)
            given_up = desk.outage.timeout(why)
            if not self._desks:
                raise TargetUnavailable(f"no endpoint of regenerate.endpoints is left: {given_up}")
            logger.warning("%s; %d other endpoints go on", given_up, len(self._desks))


@contextmanager
def endpoint_answerer(
    config: Config, template: ChatTemplate, *, context: int | None, also_stop: Collection[int] = ()
) -> Iterator[EndpointAnswerer]:
    """The servers of `regenerate.endpoints`, each of them checked, while the body runs.

    `context` is the target's own limit of tokens; `also_stop` end an answer beside the template's stop tokens.
    Raises `ConfigError`, and `TargetUnavailable` if a server does not answer.
    """
    try:
        from eagle_rpc.answers.endpoint import Asking, Endpoint
    except ModuleNotFoundError as error:
        rule = "regenerate.backend=openai needs the package openai"
        raise ConfigError(f"{rule}: pip install 'eagle-rpc[openai]'") from error
    asking = Asking(
        settings=config.regenerate,
        target=config.target.model,
        context=context,
        tokenizer=template.tokenizer,
        stop_token_ids=template.stop_token_ids.union(also_stop),
        end_of_turn=template.end_of_turn_id,
        seed=config.run.seed,
    )
    api_key = _api_key(config.regenerate.api_key_file)
    endpoints = [Endpoint(url, api_key, asking) for url in config.regenerate.endpoints]
    with closing(asyncio.new_event_loop()) as loop:
        try:
            loop.run_until_complete(_checked(endpoints))
            answerer = EndpointAnswerer(loop, endpoints, config)
            try:
                yield answerer
            finally:
                loop.run_until_complete(answerer.close())
        finally:
            for endpoint in endpoints:
                loop.run_until_complete(endpoint.close())


async def _checked(endpoints: "Sequence[Endpoint]") -> None:
    """Checks all endpoints at a time; raises the first error once every check has ended."""
    found = await asyncio.gather(*(one.check() for one in endpoints), return_exceptions=True)
    for error in found:
        if error is not None:
            raise error


def _api_key(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        key = Path(path).expanduser().read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        rule = "regenerate.api_key_file must be a text file that this process may read"
        raise ConfigError(f"{rule}, got {path} ({error})") from error
    if not key:
        raise ConfigError(f"regenerate.api_key_file must hold a key, got the empty file {path}")
    return key
