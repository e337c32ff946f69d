"""What RPC may call and unpickle: in targets the requests of trainers, in trainers the answers."""

from typing import Any

from eagle_rpc import supervision
from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.rpc import WORLD_FUNCTIONS, Permissions
from eagle_rpc.rpc.elastic import introduce
from eagle_rpc.rpc.envelope import Failure, Ok
from eagle_rpc.rpc.link import call_hosted, hosted_rref
from eagle_rpc.service.endpoint import CONTROL_METHODS, TargetEndpoint

_SERVED = {TargetEndpoint: CONTROL_METHODS}
_REQUESTS = frozenset(
    [
        supervision.GenerateRequest,
        supervision.SessionSpec,
        supervision.TargetExpectation,
        supervision.TokenBatch,
    ]
)
_ANSWERS = [
    supervision.ModelInfo,
    supervision.OpenedSession,
    supervision.HeartbeatReply,
    supervision.DraftHead,
]
_REPLIES = frozenset([Ok, Failure, supervision.EncodedSupervision, *_ANSWERS])


def target_permissions(config: RpcConfig) -> Permissions:
    """Of a target that trainers of other jobs find: it never sends a request."""
    functions = frozenset([introduce, hosted_rref, call_hosted])
    return Permissions(functions=functions, methods=_SERVED, types=_REQUESTS, **_limits(config))


def trainer_permissions(config: RpcConfig) -> Permissions:
    """Of a trainer that joined by itself: it answers nothing."""
    return Permissions(types=_REPLIES, proxied=frozenset(_SERVED), **_limits(config))


def static_permissions(config: RpcConfig) -> Permissions:
    """Of every worker of a static world, where one process may be target and trainer."""
    return Permissions(
        functions=frozenset([*WORLD_FUNCTIONS, hosted_rref, call_hosted]),
        methods=_SERVED,
        types=_REQUESTS | _REPLIES,
        proxied=frozenset(_SERVED),
        **_limits(config),
    )


def _limits(config: RpcConfig) -> dict[str, Any]:
    return {"max_pickle_bytes": config.max_pickle_bytes, "max_request_bytes": config.max_request_bytes}
