"""What RPC may call and unpickle: in targets what trainers ask for, in trainers the answers."""

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.rpc import Permissions
from eagle_rpc.rpc.elastic import introduce
from eagle_rpc.rpc.envelope import Failure, Ok
from eagle_rpc.rpc.link import call_hosted, hosted_rref
from eagle_rpc.service.endpoint import CONTROL_METHODS, TargetEndpoint
from eagle_rpc.supervision import (
    DraftHead,
    EncodedSupervision,
    GenerateRequest,
    ModelInfo,
    OpenedSession,
    Pulse,
    SessionSpec,
    TargetExpectation,
    TokenBatch,
)

_REQUESTS = frozenset([GenerateRequest, SessionSpec, TargetExpectation, TokenBatch])
_REPLIES = frozenset([DraftHead, EncodedSupervision, Failure, ModelInfo, Ok, OpenedSession, Pulse])


def target_permissions(config: RpcConfig) -> Permissions:
    """Of a target that trainers of other jobs find: it never asks anybody anything."""
    return Permissions(
        functions=frozenset([introduce, hosted_rref, call_hosted]),
        methods={TargetEndpoint: CONTROL_METHODS},
        types=_REQUESTS,
        proxied=frozenset(),
        max_pickle_bytes=config.max_pickle_bytes,
        max_request_bytes=config.max_request_bytes,
    )


def trainer_permissions(config: RpcConfig) -> Permissions:
    """Of a trainer: nobody may ask it anything; it takes answers of any size, since it has asked for them."""
    return Permissions(
        functions=frozenset(),
        methods={},
        types=_REPLIES,
        proxied=frozenset([TargetEndpoint]),
        max_pickle_bytes=config.max_pickle_bytes,
        max_request_bytes=config.max_request_bytes,
    )


def static_permissions(config: RpcConfig) -> Permissions:
    """Of every worker of a static world, where one process may be target and trainer."""
    return Permissions(
        functions=frozenset([hosted_rref, call_hosted]),
        methods={TargetEndpoint: CONTROL_METHODS},
        types=_REQUESTS | _REPLIES,
        proxied=frozenset([TargetEndpoint]),
        max_pickle_bytes=config.max_pickle_bytes,
        max_request_bytes=config.max_request_bytes,
    )
