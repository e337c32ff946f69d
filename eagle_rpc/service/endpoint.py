"""How the service's methods turn what they do into replies, and what they require of arguments that anybody may send."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

from torch.futures import Future

from eagle_rpc.config.texts import NAME_RULE, is_name
from eagle_rpc.errors import EagleRpcError, InvalidRequest
from eagle_rpc.supervision import Failure, Ok, Reply, TokenBatch, failure_of, own_storage

logger = logging.getLogger(__name__)


def replies(method: Callable[..., Any]) -> Callable[..., Reply]:
    """Turns a method's value into `Ok` and whatever it raises into a typed `Failure`: senders may send anything."""

    @functools.wraps(method)
    def reply(*args: Any, **kwargs: Any) -> Reply:
        try:
            return Ok(method(*args, **kwargs))
        except EagleRpcError as error:
            return failure_of(error)
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            return Failure("failed", f"{type(error).__name__}: {error}")

    return reply


def future_of(reply: Reply) -> Future:
    """The future of a reply that the work accepted in `reply` will give, or `reply` itself in a future where it is the answer."""
    if isinstance(reply, Ok) and isinstance(reply.value, Future):
        return reply.value
    answered: Future = Future()
    answered.set_result(reply)
    return answered


def check_type(name: str, value: Any, wanted: type) -> None:
    """Raises `InvalidRequest` unless `value` is a `wanted`."""
    if not isinstance(value, wanted):
        raise InvalidRequest(f"{name} must be a {wanted.__name__}, got {type(value).__name__}")


def check_name(name: str, value: Any) -> None:
    """Raises `InvalidRequest` unless `value` is a short line of text; it may be empty."""
    check_type(name, value, str)
    if not is_name(value):
        raise InvalidRequest(f"{name} must be {NAME_RULE}, got {value!r:.80}")


def check_seconds(name: str, value: Any) -> None:
    """Raises `InvalidRequest` unless `value` is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidRequest(f"{name} must be a positive, finite number of seconds, got {value!r:.80}")


def compact(tokens: TokenBatch) -> TokenBatch:
    """`tokens` without the rest of larger storages, which senders may ship and which no bound counts."""
    return TokenBatch(
        input_ids=own_storage(tokens.input_ids),
        attention_mask=own_storage(tokens.attention_mask),
        loss_mask=own_storage(tokens.loss_mask),
        segment_ids=None if tokens.segment_ids is None else own_storage(tokens.segment_ids),
    )
