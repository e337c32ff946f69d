"""The calls and values that RPC permits: at targets requests of trainers, at trainers answers of targets."""

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.rpc import WORLD_FUNCTIONS, Permissions
from eagle_rpc.rpc.elastic import introduce
from eagle_rpc.rpc.envelope import Failure, Ok
from eagle_rpc.rpc.link import call_hosted, hosted_rref
from eagle_rpc.service.endpoint import CONTROL_METHODS, TargetEndpoint
from eagle_rpc.supervision import (
    AnswerPrompt,
    AnswerRequest,
    AnswerSettings,
    DraftHead,
    EncodedSupervision,
    GenerateRequest,
    HeartbeatReply,
    ModelInfo,
    OpenedSession,
    PromptAnswer,
    SessionSpec,
    TargetExpectation,
    TokenBatch,
)
from eagle_rpc.topology import Role

_REQUESTS = {GenerateRequest, SessionSpec, TargetExpectation, TokenBatch}
_REQUESTS |= {AnswerPrompt, AnswerRequest, AnswerSettings}
_REPLIES = {
    Ok,
    Failure,
    DraftHead,
    EncodedSupervision,
    HeartbeatReply,
    ModelInfo,
    OpenedSession,
    PromptAnswer,
}


def permissions(config: RpcConfig, role: Role | None) -> Permissions:
    """Of an elastic worker of this role; None: of a worker of a static job, which may have both roles."""
    serves, asks = role is not Role.trainer, role is not Role.target
    functions = [hosted_rref, call_hosted, *([introduce] if role else WORLD_FUNCTIONS)]
    return Permissions(
        functions=frozenset(functions if serves else ()),
        methods={TargetEndpoint: CONTROL_METHODS} if serves else {},
        types=frozenset((_REQUESTS if serves else set()) | (_REPLIES if asks else set())),
        proxied=frozenset([TargetEndpoint] if asks else []),
        max_pickle_bytes=config.max_pickle_bytes,
        max_request_bytes=config.max_request_bytes,
    )
