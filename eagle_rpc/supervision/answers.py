"""A prompt that a target is asked to answer, and what the target says."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision.tensors import check_dense

# Models name fewer than ten.
_MOST_STOP_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSettings:
    """The choice and the number of an answer's tokens. Prompts of equal settings are decoded together."""

    max_new_tokens: int  # of an answer, the stop token included
    max_length: int  # tokens of the longest prompt of the sender and its answer
    stop_token_ids: tuple[int, ...]
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # smallest set of tokens of at least this probability that sampling chooses from
    top_k: int = 0  # number of most probable tokens that sampling chooses from; 0: all
    seed: int = 0

    def check(self, *, vocab_size: int, max_length: int) -> None:
        """Raises `InvalidRequest` that names field, rule and value; `max_length`: tokens, the target's."""
        _check_whole("max_length", self.max_length, 2, max_length)
        _check_whole("max_new_tokens", self.max_new_tokens, 1, self.max_length - 1)
        _check_whole("top_k", self.top_k, 0, vocab_size)
        _check_whole("seed", self.seed, -(2**63), 2**63 - 1)
        _check_number("temperature", self.temperature, "lie in [0, inf)", lambda value: 0 <= value < math.inf)
        _check_number("top_p", self.top_p, "lie in (0, 1]", lambda value: 0 < value <= 1)
        if type(self.stop_token_ids) is not tuple or len(self.stop_token_ids) > _MOST_STOP_TOKENS:
            rule = f"stop_token_ids must be a tuple of at most {_MOST_STOP_TOKENS} ids"
            raise InvalidRequest(f"{rule}, got {self.stop_token_ids!r:.80}")
        for token_id in self.stop_token_ids:
            _check_whole("stop_token_ids", token_id, 0, vocab_size - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerPrompt:
    """The token ids after which the target speaks."""

    key: str  # sampling depends on it, beside the seed
    token_ids: Tensor  # [T] int64, T > 0
    settings: AnswerSettings

    def check(self, *, vocab_size: int, max_length: int) -> None:
        """Raises `InvalidRequest` as `AnswerSettings.check` does, also for the ids."""
        self.settings.check(vocab_size=vocab_size, max_length=max_length)
        ids, most = self.token_ids, self.settings.max_length - self.settings.max_new_tokens
        check_dense("token_ids", ids, (torch.int64,))
        if ids.dim() != 1 or not 1 <= len(ids) <= most:
            rule = f"token_ids must have shape [T] with T in [1, {most}] (max_length - max_new_tokens)"
            raise InvalidRequest(f"{rule}, got {list(ids.shape)}")
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= vocab_size:
            raise InvalidRequest(
                f"token_ids must lie in [0, {vocab_size}), got values from {lowest} to {highest}"
            )


@dataclass(kw_only=True, slots=True)
class AnswerRequest:
    """One prompt to answer; sending it twice is harmless. Fields as in `GenerateRequest`."""

    session: str
    incarnation: str
    request_id: str
    prompt: AnswerPrompt
    seconds_left: float


@dataclass(frozen=True, slots=True)
class PromptAnswer:
    """The target's answer to one prompt."""

    token_ids: Tensor  # [N] int64 on the CPU, as said, with the stop token unless `truncated`; N > 0
    truncated: bool  # it reached `max_new_tokens` without a stop token


def _check_whole(name: str, value: Any, lowest: int, highest: int) -> None:
    if type(value) is not int or not lowest <= value <= highest:
        raise InvalidRequest(f"{name} must be a whole number in [{lowest}, {highest}], got {value!r:.80}")


def _check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> None:
    if type(value) not in (int, float) or not holds(value):
        raise InvalidRequest(f"{name} must {rule}, got {value!r:.80}")
