"""The accounts of requests: the memory of their replies, the use of their sessions, and the target's counts."""

import contextlib
from collections.abc import Callable, Iterator

from eagle_rpc.errors import EagleRpcError
from eagle_rpc.service.reply_budget import ReplyBudget
from eagle_rpc.service.sessions import Session, SessionTable
from eagle_rpc.service.status import Throughput
from eagle_rpc.supervision import EncodedSupervision, PromptAnswer


class Accounts:
    """Makes the function that books the outcome of one request, for `Work.record`."""

    def __init__(self, budget: ReplyBudget, sessions: SessionTable, throughput: Throughput) -> None:
        self._budget, self._sessions, self._throughput = budget, sessions, throughput

    @contextlib.contextmanager
    def of_batch(
        self, session: Session, *, num_tokens: int, num_bytes: int
    ) -> Iterator[Callable[[EncodedSupervision | EagleRpcError], None]]:
        """For a batch of `num_tokens` real tokens; the reply gets `num_bytes` at most, unless the body raises.

        Raises as `ReplyBudget.promise`.
        """
        promised = self._budget.promise(num_bytes, run=session.spec.run, session=session.id)

        def record(outcome: EncodedSupervision | EagleRpcError) -> None:
            if isinstance(outcome, EagleRpcError):
                self._budget.release(promised)
                self._throughput.count(outcome.code)
            else:
                self._budget.fulfil(promised, outcome)
                self._sessions.count(session, num_tokens)
                self._throughput.count("ok", tokens=num_tokens, reply_bytes=outcome.num_bytes)
                if outcome.times is not None:
                    self._throughput.add_times(outcome.times)

        try:
            yield record
        except Exception:
            self._budget.release(promised)
            raise

    def of_prompt(self, session: Session) -> Callable[[PromptAnswer | EagleRpcError], None]:
        """For a prompt, whose answer is small."""

        def record(outcome: PromptAnswer | EagleRpcError) -> None:
            if isinstance(outcome, EagleRpcError):
                self._throughput.count(outcome.code)
            else:
                self._sessions.count(session, len(outcome.token_ids))
                self._throughput.count("ok", answer_tokens=len(outcome.token_ids))

        return record
